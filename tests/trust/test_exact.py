"""Exactness of training: what is interrupted and goes on, and what runs twice, ends with the same bits."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import engine
import main
from runs.training_run import Run
from tests.tiny_run import options, tiny_options

EPOCHS = 3
RUNS = {
    "step, ema, accumulated": "--ema_decay 0.9 --accumulate 2 --lr_drop 2 --dropout 0.1",
    "bf16, cosine, warm-up": "--amp bf16 --lr_schedule cosine --warmup_iters 3 --batch_norm_type BatchNorm2d",
    "deformable, bf16, all": "-m dn_dab_deformable_detr --num_feature_levels 3 --amp bf16 --ema_decay 0.9 "
    "--accumulate 2 --lr_schedule cosine --warmup_iters 1 --dropout 0.1",
}


class Interrupted(Exception):
    """Stands for whatever ends a run."""


def train(coco: Path, out: Path, words: str, workers: int = 0) -> None:
    """Train from the start, or go on with the checkpoint that is there."""
    place = ("--coco_path", coco, "--output_dir", out, f"--device cpu --num_workers {workers}")
    if (out / "checkpoint.pth").exists():
        # All else comes out of the checkpoint.
        main.main(*options(*place, "--resume", out / "checkpoint.pth"))
    else:
        main.main(*tiny_options(*place, f"--epochs {EPOCHS} {words}"))


def content_of(out: Path) -> dict:
    """The checkpoint of a run, without where it was run."""
    content = torch.load(out / "checkpoint.pth", weights_only=True)
    for name in ("output_dir", "resume", "num_workers"):
        content["args"].pop(name, None)
    return content


def losses_of(out: Path) -> list[dict]:
    """The lines of log.txt but for the seconds."""
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def differing(one, other, where: str = "") -> list[str]:
    """Places where two nested values differ, tensors and floats bit by bit."""
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: keys"]
        return [place for key in one for place in differing(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: length"]
        return [p for i, pair in enumerate(zip(one, other, strict=True)) for p in differing(*pair, f"{where}.{i}")]
    return [] if one == other else [where]


def assert_same(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule, averages, generators, figures and log of two runs are the same bits."""
    assert differing(content_of(one), content_of(other)) == []
    assert differing(losses_of(one), losses_of(other)) == []


@pytest.fixture(scope="module")
def whole(coco, tmp_path_factory) -> Callable[[str], Path]:
    """Folder of a run that nothing interrupts, by its key in `RUNS`; each is run once."""

    @functools.cache
    def run(name: str) -> Path:
        out = tmp_path_factory.mktemp("whole")
        train(coco, out, RUNS[name])
        return out

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_after_each_epoch_equals_one_that_was_not(coco, whole, tmp_path, monkeypatch, name):
    """Interrupted once more in the middle of the last epoch; worker processes read images in between."""
    words = RUNS[name]
    save, add, batches = Run._save, engine.Means.add, []

    def save_and_stop(self, line):
        save(self, line)
        raise Interrupted

    def stop_at_the_second_batch(self, *arguments, **options):
        batches.append(1)
        if len(batches) == 2:
            raise Interrupted
        add(self, *arguments, **options)

    for epoch in range(EPOCHS - 1):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Run, "_save", save_and_stop)
            train(coco, tmp_path, words, workers=2 * (epoch % 2))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(engine.Means, "add", stop_at_the_second_batch)
        train(coco, tmp_path, words)
    train(coco, tmp_path, words)
    assert len(losses_of(tmp_path)) == EPOCHS
    assert_same(whole(name), tmp_path)


def test_the_same_seed_gives_the_same_run_with_any_number_of_workers_and_another_one_another(coco, whole, tmp_path):
    name = "step, ema, accumulated"
    train(coco, tmp_path / "again", RUNS[name], workers=2)
    assert_same(whole(name), tmp_path / "again")
    train(coco, tmp_path / "other", f"{RUNS[name]} --seed 7")
    places = differing(losses_of(whole(name)), losses_of(tmp_path / "other"))
    assert any("train_loss" in place for place in places)
