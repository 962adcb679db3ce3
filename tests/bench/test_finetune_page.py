"""The tables of fine-tuning are of the figures in the files."""

import json

import pytest

from bench.finetune_page import finetune, finetune_headline, finetune_text

MACHINE = {"date": "2026-01-01", "device": "a CPU", "threads": 1, "torch": "2"}


def row(subject, label, ap, finished=True):
    return {"name": f"{subject}: {label}", "subject": subject, "ap": ap, "finished": finished,
            "options": {"lr": "2e-4"}}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    cut = {"dense": {"AP": 0.5}, "slim47": {"AP": 0.4}}
    rows = [
        row("slim47", "lr 4e-4", 0.52), row("dense", "lr 4e-4", 0.51), row("dense", "lr 1e-4", 0.515),
        row("slim47", "lr 1e-4", 0.9, finished=False), row("slim70", "lr 4e-4", 0.6),
        row("whole50", "distilled, matching", 0.3),
    ]  # fmt: skip
    for name, images in (("demo", 10000), ("bccd", None)):
        found = {"name": name, "epochs": 2, "images": images, "cut": cut, "rows": rows, "environment": MACHINE}
        (tmp_path / f"finetune_{name}.json").write_text(json.dumps(found))
    return tmp_path


def test_a_line_has_the_trainings_of_one_recipe_that_ended(results):
    lines = finetune(results).splitlines()[2:]
    assert lines[:4] == [
        "| the demo set | as cut | 50.0 | 40.0 |  |  |",
        "| the demo set | lr 1e-4 | 51.5 |  |  |  |",
        "| the demo set | lr 2e-4, distilled, matching |  |  |  | 30.0 |",
        "| the demo set | lr 4e-4 | 51.0 | 52.0 | 60.0 |  |",
    ]
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["BCCD"] * 4
    text = finetune_text(results).replace("\n", " ")
    assert "The demo set: 2 epochs over 10,000 images." in text and "BCCD: 2 epochs." in text


def test_detectors_cut_from_a_trained_one_have_lines_of_their_own_if_measured(results):
    before = finetune(results)
    (results / "finetune_bccd_trained.json").write_text((results / "finetune_bccd.json").read_text())
    more = finetune(results).removeprefix(before).splitlines()
    assert [line.split("|")[1].strip() for line in more if line] == [
        "BCCD, cut from the dense detector trained on at lr 8e-4"
    ] * 4


def test_the_headline_compares_the_best_of_each_detector(results):
    text = finetune_headline(results).replace("\n", " ")
    assert "goes from 40.0 AP as cut to 52.0." in text
    assert "The dense one has 50.0 there, and 51.5 after as many epochs (learning rates 2e-4 and 2e-4)." in text


def test_seeds_of_a_recipe_are_one_cell_and_commits_are_named(results):
    path = results / "finetune_demo.json"
    found = json.loads(path.read_text())
    more = [row("slim47", f"lr 4e-4, seed {seed}", ap) for seed, ap in ((43, 0.5), (44, 0.54))]
    found["rows"] += [{**one, "commit": commit} for one, commit in zip(more, ("a" * 40, "b" * 40), strict=True)]
    path.write_text(json.dumps(found))
    assert "| the demo set | lr 4e-4 | 51.0 | 52.0 (50.0 to 54.0) | 60.0 |  |" in finetune(results).splitlines()
    text = finetune_headline(results).replace("\n", " ")
    assert "to 52.0." in text and "(learning rates 2e-4 and 2e-4, means of 3 and 1 seeds)" in text
    assert "The runs are of the commits an older one, aaaaaaa, bbbbbbb." in finetune_text(results).replace("\n", " ")


def test_the_headline_names_a_teacher(results):
    path = results / "finetune_demo.json"
    found = json.loads(path.read_text())
    assert "teacher" not in finetune_headline(results)
    found["rows"][0]["options"] |= {"distill_queries": "matching"}
    path.write_text(json.dumps(found))
    assert "2 epochs, with the dense one as teacher, the detector with 47 %" in finetune_headline(results).replace(
        "\n", " "
    )
