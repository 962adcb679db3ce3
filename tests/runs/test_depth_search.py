"""Searches that may drop the last decoder layers."""

import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import export
import inference
import main
from models.widths import Widths
from pruning.cost import cost_of, params_by_widths
from pruning.cost_tables import Prices
from pruning.journal import Trial
from pruning.kept_channels import none_kept
from pruning.schedule import MGP
from pruning.state_cache import PassCounter
from pruning.transplant import widths_after
from pruning.workbench import DetectorBench
from reports.report import render
from reports.samples import Samples
from reports.search_log import trial_cells
from reports.search_page import read_search
from runs.config import TrainingOptions
from runs.search_command import get_pruning_parser, search
from tests.pruning.test_latency_search import by_width, time_of
from tests.pruning.tiny import VARIANTS, tiny_args, tiny_detector
from tests.test_main import SLOW
from tests.tiny_run import options, write_self_annotated
from util.cli import parse
from util.errors import UserError
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint, save_checkpoint

DROPPING = "--keep 0.7 --min_dec_layers 1"


@pytest.fixture(scope="module", params=VARIANTS)
def root(request, tmp_path_factory) -> Path:
    """The folder of `write_deep` for each variant."""
    return write_deep(tmp_path_factory.mktemp(request.param), VARIANTS[request.param])


def write_deep(root: Path, network: str) -> Path:
    """Images annotated by dense.pth, of one decoder layer; deep.pth has two more, which find less."""
    write_self_annotated(root, f"{network} --dec_layers 1")
    deep = tiny_detector(f"{network} --dec_layers 3", seed=1)[0]
    deep.load_state_dict({**deep.state_dict(), **read_checkpoint(root / "dense.pth").state_dict})
    arguments = vars(tiny_args(f"{network} --dec_layers 3 --image_size 64"))
    save_checkpoint(root / "deep.pth", state_dict=deep.state_dict(), widths=deep.widths, full_widths=deep.widths,
                    arguments=arguments, num_classes=7)  # fmt: skip
    return root


def prune(root: Path, out: Path, more: str, resume: Path | None = None, times=by_width):
    text = (f"--coco_path {root} --output_dir {out} --resume {resume or root / 'deep.pth'} --batch_size 2 "
            f"--num_workers 0 --device cpu --attention_unit 2 --ffn_unit 8 --search_split val2017 {more}")  # fmt: skip
    with mock.patch("pruning.latency.time_steps", times):
        return search(MGP, *parse(get_pruning_parser(MGP, "a test"), text.split()))


def evaluate(root: Path, out: Path, path: Path, more: str = "") -> float:
    return main.main(*options("--coco_path", root, "--output_dir", out, "--num_workers 0 --device cpu --batch_size 2",
                              "--eval --resume", path, more))["AP"]  # fmt: skip


def detector_at(path: Path) -> torch.nn.Module:
    checkpoint = read_checkpoint(path)
    return build_detector(options_for(TrainingOptions(), checkpoint).detector, checkpoint)[0]


def lines_of(out: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize(
    ("budget", "cost"),
    [
        ("--keep 0.7", lambda model, size_hw: cost_of(model).transformer_params),
        ("--keep 0.97 --cost macs --scope detector", lambda model, size_hw: cost_of(model, size_hw).detector_gmacs),
        ("--keep 0.7 --cost latency --reconstruct none --ranking magnitude",
         lambda model, size_hw: time_of(model.widths) - 2),
    ],
    ids=["params", "detector", "latency"],
)  # fmt: skip
def test_layers_are_dropped_where_that_wins_and_the_result_is_what_was_measured(root, tmp_path, budget, cost):
    whole, result = prune(root, tmp_path / "whole", budget), prune(root, tmp_path, f"{budget} --min_dec_layers 1")
    found = read_checkpoint(result.path)
    assert len(found.widths.decoder) == len(found.full_widths.decoder) == found.arguments["dec_layers"] == 1
    assert found.widths == result.widths and {*found.kept} <= {*found.full_widths.names()}
    assert not any("decoder.layers.1." in key for key in found.state_dict)
    assert result.ap > whole.ap and len(whole.widths.decoder) == 3
    size_hw = lines_of(tmp_path, "end")[0]["image_size_hw"]
    left = cost(detector_at(result.path), size_hw) / cost(detector_at(root / "deep.pth"), size_hw)
    chosen = [trial for trial in lines_of(tmp_path, "trial") if trial["decoder_layers"] == 1]
    best = max(chosen, key=lambda trial: trial["full_ap"])
    assert left == pytest.approx(best["kept_fraction"]) and left <= float(budget.split()[1])
    assert evaluate(root, tmp_path / "eval", result.path) == pytest.approx(result.ap, abs=1e-6)
    assert "1 of 3 decoder layers are left" in (tmp_path / "run.log").read_text()


def test_each_trial_costs_at_most_the_budget_and_hopeless_numbers_of_layers_have_none(root, tmp_path):
    result = prune(root, tmp_path, DROPPING)
    (start,), trials, (layers,) = (lines_of(tmp_path, event) for event in ("start", "trial", "layers"))
    unpruned = [evaluate(root, tmp_path / str(n), root / "deep.pth", f"--dec_layers {n}") for n in (1, 2, 3)]
    assert layers["ap_by_layer"] == pytest.approx(unpruned, abs=1e-6)
    depths = [trial["decoder_layers"] for trial in trials]
    assert depths == sorted(depths, reverse=True) and {3, 1} <= {*depths}
    best_of_three = max(trial["full_ap"] for trial in trials if trial["decoder_layers"] == 3)
    assert (2 in depths) == (unpruned[1] > best_of_three)
    dense = cost_of(detector_at(root / "deep.pth")).transformer_params
    network = next(words for name, words in VARIANTS.items() if name in root.name)
    for line in trials:
        trial = Trial.from_dict({key: value for key, value in line.items() if key != "event"})
        widths = trial.widths_after(Widths.parse(start["full_widths"]))
        model = tiny_detector(f"{network} --dec_layers {trial.decoder_layers}", widths)[0]
        assert trial.kept_fraction <= 0.7 + 1e-9
        assert trial.kept_fraction == pytest.approx(cost_of(model).transformer_params / dense, abs=1e-9)
    assert max(trial["full_ap"] for trial in trials) == result.ap
    passes = [trial["whole_passes"] for trial in trials]
    assert passes == sorted(passes)


def test_no_layer_is_dropped_by_default_or_where_it_loses(root, tmp_path):
    plain = prune(root, tmp_path / "plain", "--keep 0.7")
    assert len(plain.widths.decoder) == 3 and not lines_of(tmp_path / "plain", "layers")
    same = prune(root, tmp_path / "same", "--keep 0.7 --min_dec_layers 3")
    assert same.widths == plain.widths and same.ap == plain.ap


@pytest.fixture(scope="module")
def needs_all(tmp_path_factory) -> Path:
    """Images annotated by dense.pth, of three decoder layers, whose first ones find little."""
    return write_self_annotated(tmp_path_factory.mktemp("all"), "--dec_layers 3")


CURVE = "--keep 0.6 0.45 0.3 --min_dec_layers 1"


@pytest.fixture(scope="module")
def curve(needs_all, tmp_path_factory) -> Path:
    """The folder of a search with three budgets, the least of which three layers exceed at any width."""
    out = tmp_path_factory.mktemp("curve")
    prune(needs_all, out, CURVE, needs_all / "dense.pth")
    return out


def test_each_budget_has_its_own_number_of_layers(needs_all, curve, tmp_path):
    points = json.loads((curve / "summary.json").read_text())["points"]
    assert [point["name"] for point in points] == ["before", "0.60", "0.45", "0.30"]
    assert [len(point["widths"][1]) for point in points[1:]] == [3, 3, 1]
    dense = cost_of(detector_at(needs_all / "dense.pth"))
    for point in points[1:]:
        slim = cost_of(detector_at(curve / point["file"]))
        assert slim.transformer_params / dense.transformer_params == pytest.approx(point["kept_fraction"])
        assert point["kept_fraction"] <= float(point["name"]) and point["params"] == slim.params
        assert evaluate(needs_all, tmp_path / point["name"], curve / point["file"]) == pytest.approx(point["ap"])
    log = (curve / "run.log").read_text()
    assert "budget 0.45: 3 of 3 decoder layers are left" in log and "budget 0.30: 1 of 3" in log
    # The budgets that three layers fit are not tried with fewer, whose unpruned mAP is below theirs.
    assert {(trial["keep"], trial["decoder_layers"]) for trial in lines_of(curve, "trial")} == {
        (0.6, 3), (0.45, 3), (0.3, 1)}  # fmt: skip


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = read_checkpoint(one), read_checkpoint(other)
    assert first.widths == second.widths and {*first.state_dict} == {*second.state_dict}
    assert all(torch.equal(value, second.state_dict[key]) for key, value in first.state_dict.items())


def journal_begun(out: Path, source: Path, count: int) -> None:
    """Write the first `count` lines of a journal, and half of the next one, to `out`."""
    lines = (source / "search.jsonl").read_bytes().splitlines(keepends=True)
    out.mkdir()
    (out / "search.jsonl").write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])


def test_an_interrupted_search_ends_as_it_would_have(root, tmp_path):
    result = prune(root, tmp_path / "whole", DROPPING)
    last = len((tmp_path / "whole" / "search.jsonl").read_text().splitlines()) - 1
    for count in (1, 2, 4, last):
        journal_begun(tmp_path / str(count), tmp_path / "whole", count)
        again = prune(root, tmp_path / str(count), f"{DROPPING} --resume_search")
        assert again.ap == result.ap
        assert_same_weights(result.path, again.path)


def test_interrupted_budgets_keep_their_numbers_of_layers(needs_all, curve, tmp_path):
    lines = (curve / "search.jsonl").read_text().splitlines()
    # mAP by layer may be rounded differently on another machine; that of the journal counts.
    with mock.patch("pruning.workbench.DetectorBench.ap_by_layer", side_effect=AssertionError):
        for count in (2, 5, len(lines) - 2):
            journal_begun(tmp_path / str(count), curve, count)
            prune(needs_all, tmp_path / str(count), f"{CURVE} --resume_search", needs_all / "dense.pth")
            for name in ("0.60", "0.45", "0.30"):
                assert_same_weights(curve / f"pruned_{name}.pth", tmp_path / str(count) / f"pruned_{name}.pth")


def test_a_journal_of_other_layers_is_refused(needs_all, curve, tmp_path):
    journal_begun(tmp_path / "out", curve, 2)
    path = tmp_path / "out" / "search.jsonl"
    start, layers, _ = path.read_bytes().splitlines(keepends=True)
    for wrong, message in (([0.1], "found mAP after 1 decoder layers, expected 3"), (["x"], "damaged layers")):
        path.write_bytes(start + json.dumps({**json.loads(layers), "ap_by_layer": wrong}).encode() + b"\n")
        with pytest.raises(UserError, match=message):
            prune(needs_all, tmp_path / "out", f"{CURVE} --resume_search", needs_all / "dense.pth")


@pytest.mark.parametrize("words", ["", "--scope detector --block_unit 4"])
def test_a_bench_of_fewer_layers_finds_what_the_detector_does_after_them(root, tmp_path, words):
    found = {}

    class Stop(Exception):
        """Ends the search once the shallower bench is there."""

    def keep(bench, model, criterion):
        found[len(model.widths.decoder)] = shallower(bench, model, criterion).full_ap()
        raise Stop

    shallower = DetectorBench.shallower
    with mock.patch.object(DetectorBench, "shallower", keep), pytest.raises(Stop):
        prune(root, tmp_path, f"{DROPPING} {words} --keep 0.95")
    ((layers, ap),) = found.items()
    (line,) = lines_of(tmp_path, "layers")
    assert layers < 3 and ap == pytest.approx(line["ap_by_layer"][layers - 1], abs=1e-9)


def test_the_output_is_read_by_every_script(root, tmp_path, monkeypatch):
    result = prune(root, tmp_path / "found", DROPPING)
    built = []
    monkeypatch.setattr(export, "export", lambda model, *_, **__: built.append(model) or sys.exit())
    with pytest.raises(SystemExit):
        export.main(*parse(export.get_export_parser(), f"--resume {result.path} --output_dir {tmp_path}/e".split()))
    assert len(built[0].transformer.decoder.layers) == 1
    inference.main(*parse(inference.get_inference_parser(), f"{root}/val2017/0.jpg --device cpu --num_workers 0 "
                          f"--resume {result.path} --output_dir {tmp_path}/i".split()))  # fmt: skip
    again = prune(root, tmp_path / "again", "--keep 0.9 --min_dec_layers 1", result.path)
    assert len(again.widths.decoder) == 1
    main.main(*options("--coco_path", root, "--output_dir", tmp_path / "tuned", SLOW, "--batch_size 2 --use_dn",
                       "--epochs 1 --resume", result.path, "--distill", root / "deep.pth"))  # fmt: skip
    assert len(read_checkpoint(tmp_path / "tuned" / "checkpoint.pth").widths.decoder) == 1


def test_layers_without_any_module_count(root, tmp_path):
    """A search with --min_units 0 may leave a layer whose three modules are removed."""
    deep = read_checkpoint(root / "deep.pth")
    names = [name for name in deep.widths.names() if name.startswith("decoder.1.")]
    model, _, _ = build_detector(options_for(TrainingOptions(), deep).detector, deep)
    modules = model.prunable_modules()
    kept = {name: none_kept(modules[name]) for name in names}
    path = tmp_path / "removed.pth"
    save_checkpoint(path, state_dict=deep.state_dict, widths=widths_after(deep.widths, kept), full_widths=deep.widths,
                    arguments=deep.arguments, num_classes=7, kept=kept)  # fmt: skip
    result = prune(root, tmp_path / "out", "--keep 0.8 --min_dec_layers 1", path)
    trials = lines_of(tmp_path / "out", "trial")
    assert len(result.widths.decoder) == 1 and {3, 1} <= {trial["decoder_layers"] for trial in trials}
    assert evaluate(root, tmp_path / "eval", result.path) == pytest.approx(result.ap, abs=1e-6)


def test_the_report_shows_dropped_layers(curve):
    page = render(curve, "search", Samples(torch.device("cpu")))
    assert "pruned_0.30.pth" in page and "decoder.2.ffn" in page and "decoder layers" in page
    facts = read_search(curve)
    assert {(trial.keep, trial.decoder_layers) for trial in facts.chosen} == {(0.3, 1), (0.45, 3), (0.6, 3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--keep 0.7 --min_dec_layers 4",
         r"^--min_dec_layers 4: the detector has 3 decoder layers, expected 1 to 3$"),
        ("--keep 0.7 --min_dec_layers 0", r"--min_dec_layers: 0: expected a whole number from 1 up"),
        ("--search visit --min_dec_layers 1",
         r"^--min_dec_layers: --search visit does not use it, expected --search fast$"),
        ("--keep 0.05 --min_dec_layers 1",
         r"^--keep 0\.05: found less than the smallest widths cost, expected at least 0\.\d+$"),
        ("--cost latency --target_ms 3 --min_dec_layers 1",
         r"^--target_ms 3: found less than the smallest widths take, expected at least \d+$"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_one_sentence(root, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prune(root, tmp_path, options)


def test_dropped_layers_make_a_budget_affordable():
    prices = Prices(10.0, {"a": {1: 1.0, 2: 2.0}}, dropped=4.0)
    prices.check(0.5)
    with pytest.raises(UserError, match=r"--keep 0\.4: .* at least 0\.500$"):
        prices.check(0.4)


def test_passes_end_before_dropped_layers():
    counter = PassCounter({"a": 0.5, "b": 0.3, "c": 0.2})
    counter.add("a", None, 10)
    counter.end = "c"
    counter.add("b", None, 10)
    counter.add("a", "b", 10)
    assert counter.whole_passes == pytest.approx(10 + 3 + 5)
    assert counter.to_dict()["images_by_range"] == {"a:end": 10, "b:c": 10, "a:b": 10}


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_parameters_without_the_last_layers_are_counted(network):
    whole = tiny_detector(f"{network} --dec_layers 3")[0]
    for count in (1, 2, 3):
        widths = whole.widths.first_layers(count).replace("decoder.0.ffn", 8)
        slim = tiny_detector(f"{network} --dec_layers {count}", widths)[0]
        assert params_by_widths(whole)(widths) == cost_of(slim).transformer_params


def test_the_table_of_trials_has_decoder_layers_only_where_they_were_tried():
    plain = [Trial(0.5, 1.0, {}, 0.4, 0.5), Trial(0.5, 2.0, {}, 0.3, 0.5)]
    columns, rows = trial_cells(plain, plain[:1])
    assert "decoder layers" not in columns and [row[0] for row in rows] == ["*", ""]
    dropped = [plain[0], dataclasses.replace(plain[1], decoder_layers=1)]
    columns, rows = trial_cells(dropped, dropped[1:])
    assert columns[-1] == "decoder layers" and [row[-1] for row in rows] == ["all", 1]
    assert {len(columns)} == {len(row) for row in rows}
