"""Fine-tuning stops without a better AP, and compares the detector with the ones before it."""

import json
from pathlib import Path

import pytest

import main
from reports.comparison import COMPARISON_NAME, read_comparison
from reports.training_page import training_page
from runs.compared_detectors import Comparison
from runs.config import TrainingConfig
from runs.training_run import Run
from runs.training_state import TrainingState
from tests.pruning.tiny import tiny_detector
from tests.runs.test_recipe import MACHINE, write_dense, write_search
from tests.tiny_run import TINY, options, tiny_options
from util.errors import UserError


def epochs_until_stalled(aps: list[float | None], patience: int) -> int:
    """Epochs trained until the training stalls, or all; None is an epoch without an evaluation."""
    state = TrainingState(tiny_detector("")[0], TrainingConfig(epochs=len(aps), patience=patience), 1)
    for ap in aps:
        state.epoch += 1
        if ap is not None:
            state.record_ap(ap)
        if state.is_stalled:
            break
    return state.epoch


@pytest.mark.parametrize(
    ("aps", "patience", "epochs"),
    [
        ([0.1, 0.1, 0.1, 0.1], 0, 4),
        ([0.1, 0.1, 0.1, 0.1], 1, 2),
        ([0.1, 0.2, 0.2, 0.1, 0.3], 2, 4),
        ([0.1, 0.0, 0.2, 0.0, 0.3, 0.0], 2, 6),
        ([0.0, 0.0, 0.0], 2, 3),
        ([None, None, None, 0.1, None, 0.2], 2, 6),  # epochs without an evaluation end nothing
        ([0.2, None, None, 0.1, 0.3], 2, 4),
        ([-1, -1, -1, -1], 1, 4),  # without boxes in val2017 no epoch is better or worse
    ],
)
def test_training_stalls_after_so_many_epochs_without_a_better_ap(aps, patience, epochs):
    assert epochs_until_stalled(aps, patience) == epochs


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def test_a_stalled_run_stops_and_continues_only_with_more_patience(coco, tmp_path):
    """At rate 0 no epoch is better than the first."""
    words = "--lr 0 --lr_backbone 0 --weight_decay 0 --no-use_dn --epochs 9 --patience 2"
    args, typed = options(TINY, words, "--coco_path", coco, "--output_dir", tmp_path)
    main.main(args, typed)
    assert len(lines_of(tmp_path)) == 3
    assert "stopped: no better AP for 2 epochs (--patience)" in (tmp_path / "run.log").read_text()
    again = ("--coco_path", coco, MACHINE, "--output_dir", tmp_path, "--resume", tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"checkpoint\.pth: its training stopped after 2 epochs without a better AP"):
        main.main(*options(*again))
    main.main(*options(*again, "--patience 4"))
    assert [line["epoch"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def tuned(coco, tmp_path_factory) -> Path:
    """Folder of a fine-tuned search's output, with its teacher."""
    root = tmp_path_factory.mktemp("tuned")
    pruned = write_search(root / "pruned.pth", write_dense(root / "dense.pth"))
    main.main(*options("--coco_path", coco, MACHINE, "--epochs 2 --batch_size 2 --ema_decay 0.5 --output_dir",
                       root / "out", "--resume", pruned))  # fmt: skip
    return root


def test_the_comparison_has_the_figures_of_evaluations(coco, tuned, tmp_path):
    dense, cut, best = read_comparison(tuned / "out")
    assert [row.name for row in (dense, cut, best)] == ["dense", "as cut", "fine-tuned"]
    lines = lines_of(tuned / "out")
    assert best.ap == max(line["test_AP"] for line in lines) == lines[best.epoch]["test_AP"]
    for row, path in ((dense, "dense.pth"), (cut, "pruned.pth"), (best, "out/checkpoint_best.pth")):
        main.main(*options("--coco_path", coco, MACHINE, "--batch_size 2 --eval --output_dir", tmp_path, "--resume",
                           tuned / path))  # fmt: skip
        found = json.loads((tmp_path / "eval.json").read_text())
        assert (row.ap, row.ap50) == (found["AP"], found["AP50"])
        assert (row.params, row.detector_gmacs) == (found["params"], found["detector_gmacs"])
        assert row.milliseconds > 0
    assert cut.params == best.params < dense.params and cut.milliseconds == best.milliseconds


def test_log_and_report_show_the_comparison(tuned):
    log = (tuned / "out" / "run.log").read_text()
    table = log.split("ms an image")[1]
    assert all(name in table for name in ("dense", "as cut", "fine-tuned, epoch"))

    class NoSamples:
        def section(self, *_):
            return ""

    page = training_page(tuned / "out", NoSamples())
    assert "What fine-tuning gained" in page and "fine-tuned, epoch" in page


def test_a_resumed_run_keeps_the_detectors_before_it_and_a_new_run_does_not(coco, tuned, tmp_path, monkeypatch):
    save, out = Run._save, tmp_path / "out"

    def save_and_stop(self, line):
        save(self, line)
        raise KeyboardInterrupt

    words = ("--coco_path", coco, MACHINE, "--epochs 2 --batch_size 2 --ema_decay 0.5 --output_dir", out, "--resume")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_save", save_and_stop)
        main.main(*options(*words, tuned / "pruned.pth"))
    assert [row.milliseconds for row in read_comparison(out)] == [None] * 3
    main.main(*options("--coco_path", coco, MACHINE, "--output_dir", out, "--resume", out / "checkpoint.pth"))
    for row, wanted in zip(read_comparison(out), read_comparison(tuned / "out"), strict=True):
        assert row.with_milliseconds(None) == wanted.with_milliseconds(None) and row.milliseconds > 0
    main.main(*tiny_options("--coco_path", coco, "--output_dir", out, "--epochs 1"))
    assert read_comparison(out) == [] and (out / "comparison.1.json").exists()


@pytest.mark.parametrize("content", ["[1]", "{", '[{"name": "dense"}]', "3"])
def test_a_damaged_comparison_is_a_sentence(tmp_path, content):
    (tmp_path / COMPARISON_NAME).write_text(content)
    with pytest.raises(
        UserError, match=r"comparison\.json: cannot be read .*, expected the detectors of a run as JSON"
    ):
        Comparison(tmp_path, None, None, continuing=True)
