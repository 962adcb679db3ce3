"""Searches of the whole detector (`--scope detector`), from the options to the output file."""

import argparse
import functools
import json

import pytest
import torch

from datasets.coco import build_dataset
from main import get_args_parser, main
from models.widths import BACKBONE
from pruning.cost import cost_of
from pruning.schedule import GP, MGP
from tests.pruning.test_end_to_end import SMALL, ap_of, folder, write_folder  # noqa: F401
from tests.pruning.test_resume import assert_same_file, lines_of, search_with, words_of
from tests.pruning.tiny import VARIANTS, tiny_args, tiny_detector
from tests.soak import rest_in_soak
from tests.tiny_run import built, settled
from tests.trust.forked import job, run_jobs
from util.cli import parse
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint

UNITS = "--scope detector --attention_unit 4 --ffn_unit 16 --block_unit 4"
KINDS = {
    "keep": "--keep 0.94 --search_split val2017",
    "keep params": "--keep 0.94 --cost params --reconstruct output --ranking first_order --selection once",
    "tolerance": "--map_tol 0.2 --search_split val2017",
    "visit": "--search visit --map_tol 0.3",
    "paper": "--search paper --map_tol 0.3 --num_candidates_attention 8 --num_candidates_ffn 9",
    "magnitude": "--keep 0.94 --reconstruct none --ranking magnitude --selection once",
}
GLOBAL = ("keep", "keep params", "tolerance", "magnitude")
SEARCHES = [(variant, kind) for variant in VARIANTS for kind in KINDS]
QUICK = [("dense", "keep"), ("dense", "tolerance"), ("dense", "visit"), ("dense", "paper"), ("deformable", "keep")]


def words(root, out, kind, more=""):
    return words_of(root, out, f"{UNITS} {KINDS[kind]} {more}")


def run(root, out, kind, more="", schedule=MGP):
    return search_with(words(root, out, kind, more), schedule)


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):  # noqa: F811
    """A folder with a checkpoint and images of two sizes for each variant."""
    return {"dense": folder, "deformable": write_folder(tmp_path_factory.mktemp("deformable"), VARIANTS["deformable"])}


@pytest.fixture(scope="module")
def searched(folders, tmp_path_factory):
    """What the search of a kind finds, run once."""
    return functools.cache(lambda kind, variant="dense": run(folders[variant], tmp_path_factory.mktemp("whole"), kind))


@pytest.mark.parametrize(("variant", "kind"), rest_in_soak(SEARCHES, QUICK))
def test_the_map_of_a_search_is_that_of_the_cut_detector(folders, searched, variant, kind):
    result = searched(kind, variant)
    dense = tiny_detector(VARIANTS[variant])[0]
    assert len(result.widths.backbone) == len(dense.backbone[0].widths)
    assert set(result.kept) == set(dense.prunable_modules("detector"))
    blocks = [name for name in result.kept if name.startswith(f"{BACKBONE}.")]
    full = dense.widths_in("detector")
    narrowed = [name for name in result.kept if result.widths.of(name) < full.of(name)]
    # Each visit has its own target, so the paper's search may leave every block of so small a detector whole.
    assert set(narrowed) & set(result.kept if kind == "paper" else blocks)
    args = tiny_args(f"{SMALL} --coco_path {folders[variant]} --resume {result.path} --eval")
    slim = built(*settled(args)[:2])
    assert slim[0].widths_in("detector") == result.widths  # a whole backbone has no widths of its own
    split = read_checkpoint(result.path).arguments["search_split"]
    assert ap_of(slim[0], slim[2]["bbox"], args, split) == pytest.approx(result.ap, abs=1e-3)
    lines = [json.loads(line) for line in lines_of(result)]
    step = "trial" if kind in GLOBAL else "decision"
    assert [line["event"] for line in lines] == ["start", *[step] * (len(lines) - 2), "end"]
    assert lines[0]["full_widths"] == full.to_list() and lines[-1]["widths"] == result.widths.to_list()
    if kind not in GLOBAL:
        order = [line["module"] for line in lines if line.get("accepted")]
        assert order == list(MGP.order(dense.prunable_modules("detector")))


@pytest.mark.parametrize(
    ("variant", "kind"), rest_in_soak([("dense", "keep"), ("dense", "keep params"), ("deformable", "keep")],
                                      [("dense", "keep")])
)  # fmt: skip
def test_a_fraction_of_the_whole_detectors_cost_is_kept_but_no_more(folders, searched, variant, kind):
    result = searched(kind, variant)
    args = tiny_args(f"{SMALL} --coco_path {folders[variant]} --resume {result.path} --eval")
    size_hw = build_dataset("val2017", args)[0][0].shape[-2:]
    dense, slim = tiny_detector(VARIANTS[variant])[0], built(*settled(args)[:2])[0]
    before, after = (cost_of(model, tuple(size_hw)) for model in (dense, slim))
    name = "params" if kind == "keep params" else "detector_gmacs"
    trials = [json.loads(line) for line in lines_of(result)[1:-1]]
    best = max(trials, key=lambda trial: trial["full_ap"])
    assert getattr(after, name) / getattr(before, name) == pytest.approx(best["kept_fraction"], abs=1e-9)
    assert 0.91 < best["kept_fraction"] <= 0.94


def test_main_evaluates_what_a_search_found(folder, searched, tmp_path):  # noqa: F811
    result = searched("keep")
    text = f"--coco_path {folder} --resume {result.path} --eval --output_dir {tmp_path} --device cpu --num_workers 0"
    main(*parse(argparse.ArgumentParser(parents=[get_args_parser()]), text.split()))
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["AP"] == pytest.approx(result.ap, abs=1e-3)


@pytest.mark.parametrize(
    ("variant", "kind"), rest_in_soak([*SEARCHES], [("dense", "keep"), ("dense", "visit")])
)  # fmt: skip
def test_a_search_killed_at_any_step_ends_as_it_would_have(folders, searched, tmp_path, variant, kind):
    lines = lines_of(searched(kind, variant))
    counts = range(1, len(lines)) if kind in GLOBAL else {1, len(lines) // 3, len(lines) - 1}
    for count in counts:
        out = tmp_path / str(count)
        out.mkdir()
        (out / "search.jsonl").write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        run(folders[variant], out, kind, "--resume_search")
        assert_same_file(searched(kind, variant).path.parent, out)


@pytest.mark.parametrize("kind", rest_in_soak(["keep", "visit", "paper"], ["keep"]))
def test_two_processes_find_what_one_finds(folder, tmp_path, kind):  # noqa: F811
    """Also where the second process has no image to calibrate on."""
    more = {"shared": "--calibration_images 512", "first alone": "--calibration_images 2"}
    more = {"": ""} if kind == "paper" else more
    jobs = [job(2, "mgp", words(folder, tmp_path / f"two{len(name)}", kind, text)) for name, text in more.items()]
    run_jobs(tmp_path / "jobs.json", jobs)
    for name, text in more.items():
        alone = run(folder, tmp_path / f"one{len(name)}", kind, text)
        together = read_checkpoint(tmp_path / f"two{len(name)}" / "pruned.pth")
        assert together.widths == alone.widths, name
        for module, kept in alone.kept.items():
            assert all(torch.equal(indices, together.kept[module][part]) for part, indices in kept.items()), module


def test_memory_changes_no_result(folder, searched, tmp_path):  # noqa: F811
    result = searched("keep")
    run(folder, tmp_path, "keep", "--cache_gb 0")
    assert_same_file(result.path.parent, tmp_path)
    log = " ".join((tmp_path / "run.log").read_text().split())
    assert "are for calibration: in a trial, the fit of a residual block needs at most 5 passes" in log


def test_the_reference_rule_for_padding_needs_no_batches_of_one_size(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    write_folder(root, "--padding_rule reference")
    result = run(root, tmp_path / "out", "keep", "--padding_rule reference")
    args = tiny_args(f"{SMALL} --coco_path {root} --resume {result.path} --eval")
    slim, _, postprocessors = built(*settled(args)[:2])
    assert slim.padding_rule == "reference" and slim.widths == result.widths
    assert ap_of(slim, postprocessors["bbox"], args) == pytest.approx(result.ap, abs=1e-3)


@pytest.mark.parametrize("schedule", [GP, MGP], ids=["gp", "mgp"])
def test_a_journal_from_before_scopes_is_continued(folder, tmp_path, schedule):  # noqa: F811
    out, text = tmp_path / "whole", f"{SMALL} --attention_unit 4 --ffn_unit 16 --coco_path {folder} --keep 0.7"

    def prune(out, more=""):
        line = f"{text} --resume {folder}/dense.pth --output_dir {out} {more}"
        return search_with(line, schedule)

    start, *others = lines_of(prune(out))[:2]
    start = json.loads(start)
    del start["args"]["scope"], start["args"]["block_unit"], start["units"]["block_unit"]
    (tmp_path / "search.jsonl").write_bytes(json.dumps(start).encode() + b"\n" + b"".join(others))
    prune(tmp_path, "--resume_search")
    assert_same_file(out, tmp_path)


def test_a_search_of_the_detector_does_not_continue_one_of_the_transformer(folder, searched, tmp_path):  # noqa: F811
    start = json.loads(lines_of(searched("keep"))[0])
    start["args"]["scope"] = "transformer"
    (tmp_path / "search.jsonl").write_text(json.dumps(start) + "\n")
    with pytest.raises(UserError, match=r"args\.scope 'transformer', expected 'detector'"):
        run(folder, tmp_path, "keep", "--resume_search")


@pytest.mark.parametrize(
    ("rule", "sizes"), rest_in_soak([("exact", "missing"), ("exact", "wrong"), ("reference", "missing")],
                                    [("exact", "missing"), ("exact", "wrong")])
)  # fmt: skip
def test_listed_sizes_change_no_result(folder, searched, tmp_path, rule, sizes):  # noqa: F811
    """Batches of images of 64 and 80 pixels' width, where no sizes are listed, or one for all."""
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    for name in ("val2017", "train2017", "dense.pth"):
        (root / name).symlink_to(folder / name)
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        for image in content["images"]:
            del image["width"], image["height"]
            image.update({"width": 64, "height": 64} if sizes == "wrong" else {})
        (root / "annotations" / path.name).write_text(json.dumps(content))
    more = f"--batch_size 5 --padding_rule {rule}"
    (whole := tmp_path / "whole").mkdir()
    run(folder, whole, "keep", more)
    run(root, tmp_path / "out", "keep", more)
    assert_same_file(whole, tmp_path / "out")


def test_the_unit_of_blocks_is_refused_without_blocks(folder, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"--block_unit: --scope transformer does not use it, expected --scope detect"):
        run(folder, tmp_path, "keep", "--scope transformer")
