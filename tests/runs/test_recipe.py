"""The recipe of fine-tuning a search's output: each value follows its rule, typed options replace it."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import main
from models import build_model
from models.config import DetectorConfig
from pruning.kept_channels import all_kept
from reports.search_log import next_command
from runs.config import TrainingOptions
from runs.past_training import PastTraining
from runs.recipe import recipe_of
from runs.resolve_options import resolve_training
from tests.test_main import differing
from tests.tiny_run import options, tiny_options
from util.errors import UserError
from weights.build import build_detector
from weights.checkpoint_file import read_checkpoint, save_checkpoint
from weights.teacher import teacher_of

MACHINE = "--num_workers 0 --device cpu"
PARTS = {"epochs", "lr_schedule", "weight_decay_on", "lr", "lr_backbone", "warmup_iters", "ema_decay", "amp"}


def write_dense(path: Path, words: str = "") -> Path:
    """A checkpoint of the tiny detector of 4 classes."""
    args, _ = tiny_options(words)
    args.num_classes = 4
    torch.manual_seed(args.seed)
    model = build_model(args)[0]
    save_checkpoint(path, state_dict=model.state_dict(), widths=model.widths, full_widths=model.widths,
                    arguments=vars(args), num_classes=4)  # fmt: skip
    return path


def write_search(path: Path, dense: Path, past: PastTraining | None = None) -> Path:
    """The output of a search of `dense` that keeps half of one FFN; `past` is the training of `dense`."""
    checkpoint = read_checkpoint(dense)
    config = DetectorConfig.from_values({**checkpoint.arguments, "cfgs": None})
    modules = build_detector(config, checkpoint)[0].prunable_modules()
    kept = {name: all_kept(module) for name, module in modules.items()}
    kept["encoder.0.ffn"] = {"hidden": torch.arange(5, 21)}
    of_training = {"lr", "lr_backbone", "accumulate"}
    arguments = {name: value for name, value in checkpoint.arguments.items() if name not in of_training}
    arguments |= {"resume": str(dense), **({} if past is None else past.to_arguments())}
    save_checkpoint(path, state_dict=checkpoint.state_dict, widths=checkpoint.widths.replace("encoder.0.ffn", 16),
                    full_widths=checkpoint.widths, kept=kept, arguments=arguments, num_classes=4,
                    trace=[{"module": "encoder.0.ffn"}])  # fmt: skip
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense detector and the output of its search."""
    root = tmp_path_factory.mktemp("recipe")
    write_search(root / "pruned.pth", write_dense(root / "dense.pth"))
    return root


def resolved(coco: Path, start: Path, *more: str | Path) -> tuple[TrainingOptions, set[str]]:
    """Options as main.py completes them, and the names of the recipe's parts."""
    args, typed = options("--coco_path", coco, "--resume", start, MACHINE, *more)
    found, checkpoint, _ = resolve_training(TrainingOptions.from_values(vars(args)), typed)
    return found, {part.name for part in recipe_of(found, typed, checkpoint)}


@pytest.mark.parametrize(
    ("past", "lr", "lr_backbone"),
    [
        (PastTraining(4e-4, 6e-4, 64), 2e-4 / math.sqrt(2), 3e-4 / math.sqrt(2)),
        (PastTraining(4e-4, 6e-4, None), 4e-4, 6e-4),
        (PastTraining(8e-4, None, 8), 8e-4, 8e-5),
        (None, 1e-4 / math.sqrt(2), 1e-5 / math.sqrt(2)),
    ],
)
def test_rates_are_those_of_the_dense_detectors_training(coco, folder, tmp_path, past, lr, lr_backbone):
    start = write_search(tmp_path / "pruned.pth", folder / "dense.pth", past)
    training = resolved(coco, start, "--batch_size 4 --accumulate 2")[0].training
    assert (training.lr, training.lr_backbone) == pytest.approx((lr, lr_backbone), rel=0.05)
    typed = resolved(coco, start, "--batch_size 4 --accumulate 2 --lr 1e-3")[0].training
    assert typed.lr == 1e-3 and typed.lr_backbone == pytest.approx(1e-3 * lr_backbone / lr, rel=0.05)


def test_a_fine_tuned_detector_keeps_the_rates_of_the_dense_one_for_its_next_search(coco, folder, tmp_path):
    past = PastTraining(4e-4, 6e-4, 12)
    start = write_search(tmp_path / "pruned.pth", folder / "dense.pth", past)
    words = "--epochs 1 --lr 1e-5 --distill none --batch_size 2 --augmentation flip"
    main.main(*options("--coco_path", coco, MACHINE, words, "--resume", start, "--output_dir", tmp_path / "tuned"))
    tuned = read_checkpoint(tmp_path / "tuned" / "checkpoint.pth")
    assert tuned.arguments["lr"] == 1e-5 and tuned.arguments["processes"] == 1
    assert PastTraining.of(tuned.arguments) == past


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("epochs", [None, 3, 1000, 100000])
def test_each_value_follows_its_rule(coco, folder, batch_size, accumulate, epochs):
    words = f"--batch_size {batch_size} --accumulate {accumulate}" + (f" --epochs {epochs}" if epochs else "")
    found, names = resolved(coco, folder / "pruned.pth", words)
    assert names == PARTS - ({"epochs"} if epochs else set()) | {"distill"}
    training = found.training
    assert training.epochs == (epochs or 12)
    assert (training.lr_schedule, training.weight_decay_on, found.run.amp) == ("cosine", "matrices", "off")
    steps = math.ceil(math.ceil(4 / batch_size) / accumulate) * training.epochs
    assert training.lr == pytest.approx(1e-4 * math.sqrt(batch_size * accumulate / 16), rel=0.05)
    assert training.lr_backbone == pytest.approx(training.lr / 10, rel=0.05)
    assert training.warmup_iters == min(500, round(0.02 * steps))
    assert training.ema_decay == pytest.approx(min(0.9999, max(0, 1 - 50 / steps)), abs=1e-5)
    assert found.distillation.distill == str(folder / "dense.pth")


def test_processes_count_in_the_batch_and_in_the_steps(coco, folder, monkeypatch):
    alone = resolved(coco, folder / "pruned.pth", "--batch_size 4 --epochs 1000")[0].training
    monkeypatch.setenv("WORLD_SIZE", "2")
    together = resolved(coco, folder / "pruned.pth", "--batch_size 2 --epochs 1000")[0].training
    assert together == alone


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--lr_schedule step", "lr_schedule", "step"),
        ("--lr_drop 3", "lr_schedule", "step"),
        ("--weight_decay_on all", "weight_decay_on", "all"),
        ("--lr_backbone 0", "lr_backbone", 0),
        ("--warmup_iters 7", "warmup_iters", 7),
        ("--ema_decay 0", "ema_decay", 0),
        ("--ema_decay 0.5", "ema_decay", 0.5),
        ("--amp bf16", "amp", "bf16"),
        ("--distill none", "distill", None),
    ],
)
def test_a_typed_option_replaces_its_part_and_no_other(coco, folder, words, name, value):
    of_recipe, _ = resolved(coco, folder / "pruned.pth")
    found, names = resolved(coco, folder / "pruned.pth", words)
    assert name not in names and found.values() == {
        **of_recipe.values(),
        name: value,
        "lr_drop": found.values()["lr_drop"],
    }


def test_the_backbones_rate_follows_a_typed_rate(coco, folder):
    for lr in (0, 2e-5):
        training = resolved(coco, folder / "pruned.pth", f"--lr {lr}")[0].training
        assert training.lr == lr and training.lr_backbone == pytest.approx(lr / 10)


def test_only_a_searchs_output_has_the_recipe(coco, folder, tmp_path):
    defaults = TrainingOptions.from_values(vars(tiny_options()[0]))
    found, names = resolved(coco, folder / "dense.pth", "--batch_size 2 --scalar 2")
    assert names == set() and found.training == defaults.training and found.distillation == defaults.distillation
    args, typed = tiny_options("--coco_path", coco)
    found, checkpoint, _ = resolve_training(TrainingOptions.from_values(vars(args)), typed)
    assert checkpoint is None and found.training == defaults.training and found.run.amp == "off"
    args, typed = options("--coco_path", coco, MACHINE, "--eval --resume", folder / "pruned.pth")
    found, checkpoint, _ = resolve_training(TrainingOptions.from_values(vars(args)), typed)
    assert recipe_of(found, typed, checkpoint) == [] and found.training == defaults.training


def test_the_teacher_is_the_pruned_detector_only_while_it_is_that(coco, tmp_path):
    dense = write_dense(tmp_path / "dense.pth")
    pruned = read_checkpoint(write_search(tmp_path / "pruned.pth", dense))
    assert teacher_of(pruned) == str(dense) and teacher_of(read_checkpoint(dense)) is None
    args, _ = tiny_options()
    args.coco_path = str(coco)
    data = TrainingOptions.from_values(vars(args)).data
    command = f"--resume {tmp_path}/pruned.pth --batch_size 2 --use_dn"
    assert next_command("dn_dab_detr", data, True, tmp_path / "pruned.pth").endswith(f"{command} --distill {dense}")
    for change in (
        lambda: write_dense(dense, "--seed 1"),  # another detector of the same shape
        lambda: dense.write_text("no checkpoint"),
        lambda: shutil.copy(tmp_path / "pruned.pth", dense),
        dense.unlink,
    ):
        change()
        assert teacher_of(pruned) is None
        found, names = resolved(coco, tmp_path / "pruned.pth")
        assert found.distillation.distill is None and "distill" not in names
        assert next_command("dn_dab_detr", data, True, tmp_path / "pruned.pth").endswith(command)


def test_a_typed_teacher_that_is_not_the_pruned_detector_is_refused(coco, folder, tmp_path):
    stranger = write_dense(tmp_path / "stranger.pth", "--seed 1")
    words = ("--coco_path", coco, "--output_dir", tmp_path / "out", MACHINE, "--resume", folder / "pruned.pth")
    with pytest.raises(UserError, match=r"^--distill .*stranger\.pth: found other queries than the student's"):
        main.main(*options(*words, "--distill", stranger))
    assert not (tmp_path / "out" / "run.log").exists()


@pytest.mark.parametrize("queries", ["matching", "matching denoising anchors targets"])
def test_a_run_by_the_recipe_prints_it_and_resumes_bit_by_bit(coco, folder, tmp_path, monkeypatch, queries):
    """It resumes with the schedule, the averaged weights and the teacher of the start, without their options."""
    few = "--batch_size 1 --warmup_iters 3 --ema_decay 0.9 --augmentation flip --scalar 2"
    start = ("--coco_path", coco, MACHINE, few, "--resume",
             folder / "pruned.pth", "--distill_queries", queries, "--epochs")  # fmt: skip
    main.main(*options(*start, "3 --output_dir", tmp_path / "whole"))
    log = (tmp_path / "whole" / "run.log").read_text()
    for text in (
        "--lr_backbone",
        "--lr_schedule",
        "cosine",
        "--lr ",
        "2.5e-05",
        "--distill",
        str(folder / "dense.pth"),
    ):
        assert text in log
    printed = log.split("because")[1].split("AP before")[0]
    assert "--epochs" not in printed and "--ema_decay" not in printed  # typed

    save = main.Run._save

    def save_and_stop(self, line):
        save(self, line)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main.Run, "_save", save_and_stop)
        main.main(*options(*start, "3 --output_dir", tmp_path / "parts"))
    main.main(*options("--coco_path", coco, MACHINE, "--output_dir", tmp_path / "parts", "--resume",
                       tmp_path / "parts" / "checkpoint.pth"))  # fmt: skip
    parts, whole = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("parts", "whole"))
    assert whole["args"]["distill"] == str(folder / "dense.pth") and 0 < whole["args"]["ema_decay"] < 1
    assert len(whole["optimizer"]["param_groups"]) == 4
    del parts["args"], whole["args"]
    assert differing(parts, whole) == []
    assert " continues with " not in (tmp_path / "parts" / "run.log").read_text()
