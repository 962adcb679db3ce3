"""The pruning benchmarks on a tiny detector: rows are correct, and nothing is measured twice."""

import dataclasses
import json

import pytest
import torch

import engine
from bench import quality, search_cost
from bench.quality import Row, measure, print_table
from bench.subject import CPU, Pruner, Subject, uniform_widths
from pruning.cost import count_parameters
from pruning.method import FAST, METHODS
from pruning.schedule import MGP
from tests.pruning.tiny import VARIANTS
from tests.tiny_run import write_self_annotated
from util.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_self_annotated(tmp_path_factory.mktemp("quality"))


@pytest.fixture(scope="module")
def subject(folder):
    return Subject(str(folder), str(folder / "dense.pth"), train_images=2, search_images=2)


UNIFORM = Row("uniform", lambda fraction, seed: None)


def uniform(subject, **options):
    build = lambda fraction, seed: Pruner(subject, FAST).at_widths(uniform_widths(subject.dense, fraction))  # noqa: E731
    return dataclasses.replace(UNIFORM, build=build, **options)


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_uniform_widths_are_one_share_of_every_module(subject, fraction):
    widths = uniform_widths(subject.dense, fraction)
    found = [width for _, width in widths.items()]
    assert max(found) - min(found) <= 8  # all modules were 32 wide; an FFN steps by 8
    model, _ = Pruner(subject, FAST).at_widths(widths)
    assert model.widths == widths
    assert 1 - count_parameters(model.transformer) / subject.params == pytest.approx(fraction, abs=0.06)


def test_a_row_has_the_ap_of_its_detector(subject):
    found = measure(subject, uniform(subject), 0.47, epochs=0)
    model, _ = Pruner(subject, FAST).at_widths(uniform_widths(subject.dense, 0.47))
    result = engine.evaluate(
        model, subject.postprocess, subject.val, subject.val_truth, device=CPU, progress=False
    )  # fmt: skip
    assert found["ap_before"] == pytest.approx(result.stats["AP"], abs=1e-3)
    assert found["widths"] == model.widths.to_list()
    assert "ap_after" not in found


def test_fine_tuning_changes_a_copy_alone(subject):
    before = {key: value.clone() for key, value in subject.dense.state_dict().items()}
    found = measure(subject, uniform(subject, tuned=True, distilled=True), 0.25, epochs=1)
    assert {"ap_after", "ap_distilled"} <= found.keys()
    assert all(torch.equal(value, before[key]) for key, value in subject.dense.state_dict().items())


def test_a_second_call_adds_only_missing_rows(folder, tmp_path, monkeypatch, capsys):
    words = ["tiny", "--coco_path", str(folder), "--checkpoint", str(folder / "dense.pth"), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", *words, "--search_images", "2", "--epochs", "0"])
    monkeypatch.setattr(quality, "rows_of", lambda subject: [uniform(subject, fractions=(0.25, 0.47))])
    monkeypatch.setattr(quality, "schedules", lambda subject: [])
    quality.main()
    first = json.loads((tmp_path / "quality_tiny.json").read_text())
    assert [row["asked"] for row in first["rows"]] == [0.25, 0.47]
    monkeypatch.setattr(quality, "measure", lambda *arguments: pytest.fail("measured twice"))
    quality.main()
    assert json.loads((tmp_path / "quality_tiny.json").read_text()) == first
    assert (tmp_path / "quality_tiny.png").stat().st_size > 0
    assert "uniform" in capsys.readouterr().out


def test_the_deformable_variant_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    folder, out = write_self_annotated(tmp_path / "data", VARIANTS["deformable"]), tmp_path / "out"
    words = f"bench tiny --coco_path {folder} --checkpoint {folder}/dense.pth --output {out} --search_images 2"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(UserError, match=r"dense\.pth: found a dn_dab_deformable_detr, expected a dn_dab_detr"):
        quality.main()
    assert not out.exists()


def test_the_table_marks_what_was_not_reached_and_shows_the_range_of_seeds(capsys):
    row = {
        "name": "a",
        "asked": 0.47,
        "removed": 0.4,
        "ap_before": 0.2,
        "ap_before_seeds": [0.1, 0.3],
        "reached": False,
    }
    print_table({"name": "tiny", "dense_ap": 0.5, "rows": [row]})
    assert "20.0 ± 10.0 (at 40 %)" in capsys.readouterr().out


def test_searches_are_accounted_for_by_what_they_ran(subject):
    macs = search_cost.macs_of(subject.dense, subject.image_size_hw)
    eased = dataclasses.replace(MGP, map_tol=0.5, skip=0.3)
    results = [search_cost.run_search(subject, name, eased, 0, ([], 1), macs) for name in ("fast", "paper")]
    fast, paper = results
    assert paper["gmacs"] == pytest.approx(2 * macs[0] + paper["whole_passes"] * macs[1])
    assert paper["gmacs"] < paper["gmacs_original"]
    assert fast["whole_passes"] < paper["whole_passes"]
    cells = search_cost.rows(results)
    assert [row[0] for row in cells] == ["fast", "paper"]
    assert float(cells[1][3]) == float(cells[1][6]) == 1.0


def test_the_papers_search_is_the_same_without_its_caches(subject):
    macs = search_cost.macs_of(subject.dense, subject.image_size_hw)
    eased = dataclasses.replace(MGP, map_tol=0.5, skip=0.3)
    cached, _ = Pruner(subject, METHODS["paper"], 0, search_cost.SUBSET_BATCHES).scheduled(eased)
    whole = search_cost.run_search(subject, "paper", eased, 0, ([], 1), macs)
    assert whole["widths"] == cached.widths.to_list()
