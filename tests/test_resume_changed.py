"""A training run that continues with other batches, processes or images: its rates, and what it says of the change."""

import json
from pathlib import Path
from statistics import mean

import pytest
import torch

import main
from runs.training_run import Run
from tests.tiny_run import options, tiny_options, write_coco
from tests.trust.forked import job, run_jobs
from tests.trust.test_exact import differing
from util.errors import UserError
from util.learning_rate import rate

SCHEDULES = {
    "step": ("--lr_drop 3", {"schedule": "step", "drop": 3 / 5}),
    "step, warm": ("--lr_drop 3 --warmup_iters 6", {"schedule": "step", "drop": 3 / 5, "warmup": 1.5 / 5}),
    "cosine": ("--lr_schedule cosine", {"schedule": "cosine"}),
    "cosine, warm": ("--lr_schedule cosine --warmup_iters 6", {"schedule": "cosine", "warmup": 1.5 / 5}),
}
# The tiny set has 4 images, and the run begins with 4 steps an epoch.
CHANGES = {
    "batch size": ("--batch_size 4", 1, "--batch_size 1 -> 4", "optimizer steps an epoch 4 -> 1"),
    "accumulate": ("--accumulate 2", 2, "--accumulate 1 -> 2", "optimizer steps an epoch 4 -> 2"),
    "data": ("--coco_path {other}", 7, "training images 4 -> 7", "optimizer steps an epoch 4 -> 7"),
}
EPOCHS = 5
LR = 1e-4


class Interrupted(Exception):
    """Stands for whatever ends a run."""


def begin(coco: Path, out: Path, words: str, monkeypatch: pytest.MonkeyPatch, epochs: int = 1) -> None:
    """The first `epochs` epochs of a run of `EPOCHS`, in batches of one image."""
    save = Run._save

    def save_and_stop(self, line):
        save(self, line)
        if line["epoch"] == epochs - 1:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Run, "_save", save_and_stop)
        main.main(*tiny_options(f"--epochs {EPOCHS} --batch_size 1 --eval_every 100 {words}",
                                "--coco_path", coco, "--output_dir", out))  # fmt: skip


def resume_run(coco: Path, out: Path, words: str = "") -> None:
    """The rest of the run."""
    main.main(*options("--coco_path", coco, "--output_dir", out, "--resume", out / "checkpoint.pth",
                       f"--num_workers 0 --device cpu {words}"))  # fmt: skip


def rates_of(out: Path, name: str = "lr") -> list[float]:
    return [json.loads(line)[name] for line in (out / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another data set of the same categories, of 7 + 7 images."""
    return write_coco(tmp_path_factory.mktemp("other"), images=7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("change", CHANGES)
def test_learning_rates_continue_as_without_a_stop(coco, other, tmp_path, monkeypatch, schedule, change):
    words, facts = SCHEDULES[schedule]
    begin(coco, tmp_path, words, monkeypatch)
    words, steps, *said = CHANGES[change]
    resume_run(coco, tmp_path, words.format(other=other))
    expected = [
        mean(rate((epoch + (step + 0.5) / n) / EPOCHS, **facts) for step in range(n))
        for epoch, n in enumerate([4, *[steps] * (EPOCHS - 1)])
    ]
    assert rates_of(tmp_path) == pytest.approx([LR * factor for factor in expected])
    assert rates_of(tmp_path, "lr_backbone") == pytest.approx([rate / 10 for rate in rates_of(tmp_path)])
    log = (tmp_path / "run.log").read_text()
    assert log.count(" continues with ") == 1 and all(text in log for text in said)


def test_an_unchanged_run_logs_nothing_and_a_changed_option_is_named(coco, tmp_path, monkeypatch):
    begin(coco, tmp_path, "", monkeypatch, epochs=2)
    resume_run(coco, tmp_path)
    assert " continues with " not in (tmp_path / "run.log").read_text()
    assert rates_of(tmp_path) == [LR] * EPOCHS  # to the bit: a mean of equal rates is that rate
    resume_run(coco, tmp_path, f"--epochs {EPOCHS + 1} --lr 2e-5 --clip_max_norm 0.5")
    log = (tmp_path / "run.log").read_text()
    for text in ("epoch 5 continues with ", "--epochs 5 -> 6", "--lr 0.0001 -> 2e-05", "--clip_max_norm 0.1 -> 0.5"):
        assert text in log
    assert rates_of(tmp_path)[-1] == 2e-5


def test_an_epoch_cut_short_starts_over_with_its_own_rates(coco, tmp_path, monkeypatch):
    """A checkpoint is written behind an epoch, so no run continues inside one."""
    begin(coco, tmp_path, "--lr_schedule cosine", monkeypatch)
    step, steps = torch.optim.AdamW.step, []

    def stop_at_the_third(self, *arguments, **values):
        steps.append(1)
        if len(steps) == 3:
            raise Interrupted
        return step(self, *arguments, **values)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(torch.optim.AdamW, "step", stop_at_the_third)
        resume_run(coco, tmp_path)
    resume_run(coco, tmp_path, "--batch_size 2")
    assert rates_of(tmp_path) == pytest.approx([LR * f for f in (0.97, 0.79, 0.5, 0.21, 0.03)], abs=0.02 * LR)


def test_a_warm_up_keeps_its_length_in_images_until_another_is_typed(coco, tmp_path, monkeypatch):
    begin(coco, tmp_path, "--warmup_iters 16", monkeypatch)  # four epochs of four steps
    resume_run(coco, tmp_path, "--batch_size 4")
    assert rates_of(tmp_path) == pytest.approx([LR * f for f in (1 / 8, 3 / 8, 5 / 8, 7 / 8, 1)])
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert content["lr_scheduler"] == {"last_epoch": 5, "steps_per_epoch": 1, "warmup_iters": 16, "warmup_epochs": 4.0}
    resume_run(coco, tmp_path, "--epochs 6 --warmup_iters 11")  # now counted in steps of four images
    assert rates_of(tmp_path)[-1] == pytest.approx(LR * 5.5 / 11)


def test_a_checkpoint_of_an_older_version_resumes_to_the_same_bits(coco, tmp_path, monkeypatch):
    for name in ("old", "new"):
        begin(coco, tmp_path / name, "--lr_schedule cosine --warmup_iters 6", monkeypatch)
    path = tmp_path / "old" / "checkpoint.pth"
    content = torch.load(path, weights_only=True)
    for name in ("batches", "train_images"):
        del content[name]
    content["lr_scheduler"] = {"last_epoch": content["lr_scheduler"]["last_epoch"]}
    torch.save(content, path)
    for name in ("old", "new"):
        resume_run(coco, tmp_path / name)
    old, new = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("old", "new"))
    assert differing(*({**content, "args": None} for content in (old, new))) == []
    assert "continues with" not in (tmp_path / "old" / "run.log").read_text()


@pytest.mark.parametrize("length", [-1.0, float("nan"), float("inf"), "long", None])
def test_a_warm_up_of_no_length_is_refused(coco, tmp_path, monkeypatch, length):
    begin(coco, tmp_path, "", monkeypatch)
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    content["lr_scheduler"]["warmup_epochs"] = length
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"checkpoint\.pth: its training state does not fit this run"):
        resume_run(coco, tmp_path)


def test_two_processes_resume_at_the_learning_rate_of_one(coco, tmp_path, monkeypatch):
    begin(coco, tmp_path, "--lr_drop 2", monkeypatch)
    words = f"--coco_path {coco} --output_dir {tmp_path} --resume {tmp_path}/checkpoint.pth --device cpu"
    run_jobs(tmp_path / "jobs.json", [job(2, "main", f"{words} --num_workers 0")])
    assert rates_of(tmp_path) == pytest.approx([LR, LR, 0.1 * LR, 0.1 * LR, 0.01 * LR])
    log = (tmp_path / "run.log").read_text()
    assert "epoch 1 continues with processes 1 -> 2, optimizer steps an epoch 4 -> 2" in log
