"""Runs of main.py on a tiny data set: output files, resuming, and errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import engine
import main
from models import build_model
from models.config import DetectorConfig
from pruning.kept_channels import all_kept
from tests.tiny_run import RUN_SCRIPT, TINY, options, settled, tiny_options, write_coco, write_self_annotated
from util.errors import UserError
from weights.build import build_detector
from weights.checkpoint_file import read_checkpoint, save_checkpoint
from weights.strip_optimizer import strip_optimizer

ROOT = Path(main.__file__).parent
SLOW = """
    --lr 1e-6 --lr_backbone 1e-6 --weight_decay 0 --clip_max_norm 0 --no-use_dn --augmentation flip --num_workers 0
    --device cpu
"""
FROM_SCRATCH = "--batch_norm_type BatchNorm2d --ema_decay 0.9 --accumulate 2 --warmup_iters 2"


def train(coco: Path, out: Path, *more: str | Path) -> dict:
    """Train the tiny detector; returns the content of checkpoint.pth."""
    main.main(*tiny_options("--coco_path", coco, "--output_dir", out, *more))
    return torch.load(out / "checkpoint.pth", weights_only=True)


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory) -> Path:
    """Folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("trained")
    train(coco, out, "--epochs 2 --save_results", FROM_SCRATCH)
    return out


def differing(one, other, where: str = "") -> list[str]:
    """Places where two nested values differ, tensors bit by bit."""
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [where]
        return [place for key in one for place in differing(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple):
        return [p for i, (a, b) in enumerate(zip(one, other, strict=True)) for p in differing(a, b, f"{where}.{i}")]
    return [] if one == other else [where]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(coco, trained, tmp_path):
    train(coco, tmp_path, "--epochs 1", FROM_SCRATCH)
    first_line = (tmp_path / "log.txt").read_text()
    # Only the data, the checkpoint and the new length are given: the rest comes out of the checkpoint.
    main.main(*options("--coco_path", coco, "--output_dir", tmp_path, "--resume", tmp_path / "checkpoint.pth",
                       "--epochs 2 --num_workers 0 --device cpu"))  # fmt: skip
    resumed = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    whole = torch.load(trained / "checkpoint.pth", weights_only=True)
    del resumed["args"], whole["args"]
    assert differing(resumed, whole) == []
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith(first_line) and len(log.splitlines()) == 2


def test_what_a_run_leaves_in_its_folder(trained):
    lines = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert {"lr", "lr_backbone", "train_loss", "train_loss_ce", "train_tgt_loss_ce", "test_AP", "test_ARl",
                "test_loss", "train_seconds", "test_seconds", "n_parameters"} <= line.keys()  # fmt: skip
    args = json.loads((trained / "args.json").read_text())
    assert args["hidden_dim"] == 32 and args["num_classes"] == 4
    best = read_checkpoint(trained / "checkpoint_best.pth")
    assert best.training is None and best.kind == "ours"
    results = json.loads((trained / "results.json").read_text())
    assert results and set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    assert not list(trained.glob("*.tmp")) and "epoch 1: loss" in (trained / "run.log").read_text()


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    """A data set annotated by its detector dense.pth; `run` holds two epochs of training it at a tiny rate."""
    root = write_self_annotated(tmp_path_factory.mktemp("annotated"))
    main.main(*options("--coco_path", root, "--output_dir", root / "run", "--resume", root / "dense.pth", SLOW,
                       "--epochs 2 --batch_size 2"))  # fmt: skip
    return root


def test_evaluation_repeats_the_figures_of_training(annotated, tmp_path):
    stats = main.main(*options("--coco_path", annotated, "--output_dir", tmp_path, "--num_workers 0 --device cpu",
                               "--batch_size 2 --eval --resume", annotated / "run" / "checkpoint.pth"))  # fmt: skip
    assert stats["AP"] > 0.1
    lines = [json.loads(line) for line in (annotated / "run" / "log.txt").read_text().splitlines()]
    assert stats == pytest.approx({name: lines[-1][f"test_{name}"] for name in stats}, abs=1e-9)
    assert json.loads((tmp_path / "eval.json").read_text())["AP"] == stats["AP"]
    last = read_checkpoint(annotated / "run" / "checkpoint.pth")
    assert last.training["best_ap"] == max(line["test_AP"] for line in lines)


def test_a_new_run_keeps_the_files_of_an_older_one(coco, trained, tmp_path):
    for name in ("checkpoint.pth", "checkpoint_best.pth", "log.txt"):
        (tmp_path / name).write_text(f"older {name}")
    (tmp_path / "log.1.txt").write_text("oldest")
    train(coco, tmp_path, "--epochs 1 --lr 0")
    assert (tmp_path / "checkpoint.1.pth").read_text() == "older checkpoint.pth"
    assert (tmp_path / "log.2.txt").read_text() == "older log.txt" and (tmp_path / "log.1.txt").read_text() == "oldest"
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1
    assert "held an older run" in (tmp_path / "run.log").read_text()
    best = read_checkpoint(tmp_path / "checkpoint_best.pth")
    assert best.kind == "ours" and (tmp_path / "checkpoint_best.1.pth").read_text() == "older checkpoint_best.pth"


def test_more_classes_than_val_has_can_be_evaluated_but_not_resumed(coco, trained, tmp_path):
    def fewer(tables):
        tables["categories"] = [{"id": 1, "name": "kind 1"}]
        tables["annotations"] = [item for item in tables["annotations"] if item["category_id"] == 1]

    root = broken(coco, tmp_path / "coco", fewer)
    words = ("--coco_path", root, "--device cpu --output_dir", tmp_path, "--resume", trained / "checkpoint.pth")
    args, typed = options(*words, "--eval")
    assert settled(args, typed)[0].detector.num_classes == 4
    path = root / "annotations" / "instances_train2017.json"
    path.write_text((root / "annotations" / "instances_val2017.json").read_text())
    with pytest.raises(UserError, match=r"a checkpoint for 4 classes, expected 2.*; --start_fresh trains its weights"):
        main.main(*options(*words))


def test_a_halved_checkpoint_evaluates_and_trains_from_epoch_0(coco, trained, tmp_path):
    strip_optimizer(trained / "checkpoint.pth", tmp_path / "half.pth", half=True)
    assert (tmp_path / "half.pth").stat().st_size < (trained / "checkpoint_best.pth").stat().st_size * 0.6
    content = train(coco, tmp_path / "on", "--epochs 1 --resume", tmp_path / "half.pth")
    assert content["epoch"] == 1 and content["model"]["class_embed.weight"].dtype == torch.float32


def test_start_fresh_takes_the_weights_of_an_unfinished_run_alone(coco, trained, tmp_path):
    content = train(coco, tmp_path, "--start_fresh --epochs 1 --lr 0 --lr_backbone 0 --weight_decay 0",
                    "--batch_norm_type FrozenBatchNorm2d --resume", trained / "checkpoint.pth")  # fmt: skip
    before = read_checkpoint(trained / "checkpoint.pth").state_dict
    assert content["epoch"] == 1
    assert all(torch.equal(value, before[key]) for key, value in content["model"].items())


def search_output(trained: Path, path: Path) -> None:
    """A search's output that keeps half of one attention and of one FFN of the trained detector."""
    checkpoint = read_checkpoint(trained / "checkpoint.pth")
    config = DetectorConfig.from_values({**checkpoint.arguments, "cfgs": None})
    modules = build_detector(config, checkpoint)[0].prunable_modules()
    kept = {name: all_kept(module) for name, module in modules.items()}
    kept["decoder.1.cross_attention"] = {part: torch.arange(1, 32, 2) for part in ("query", "value")}
    kept["encoder.0.ffn"] = {"hidden": torch.arange(5, 21)}
    widths = checkpoint.widths.replace("decoder.1.cross_attention", 16).replace("encoder.0.ffn", 16)
    save_checkpoint(path, state_dict=checkpoint.state_dict, widths=widths, full_widths=checkpoint.widths, kept=kept,
                    arguments=checkpoint.arguments, num_classes=4, trace=[{"module": "encoder.0.ffn"}])  # fmt: skip


def test_a_searchs_output_is_cut_trained_and_then_carries_its_widths(coco, trained, tmp_path):
    search_output(trained, tmp_path / "pruned.pth")
    train(coco, tmp_path / "slim", "--epochs 1 --resume", tmp_path / "pruned.pth")
    slim = read_checkpoint(tmp_path / "slim" / "checkpoint.pth")
    assert not slim.is_search and slim.widths.of("encoder.0.ffn") == 16
    assert slim.state_dict["transformer.encoder.layers.0.in_proj_weight"].shape == (96, 32)
    log = (tmp_path / "slim" / "run.log").read_text()
    assert "--cfgs '[[[32,16]],[[32,32,32],[32,16,32]]]'" in log and "AP before fine-tuning" in log
    common = ("--coco_path", coco, "--output_dir", tmp_path, "--device cpu --num_workers 0 --eval", "--resume")
    main.main(*options(*common, slim.path))
    main.main(*options(*common, slim.path, "--cfgs [[[32, 16]], [[32, 32, 32], [32, 16, 32]]]"))
    with pytest.raises(UserError, match=r"--cfgs .* has the widths"):
        main.main(*options(*common, slim.path, "--cfgs [[[32,32]],[[32,32,32],[32,32,32]]]"))


def test_a_distilled_run_logs_its_losses_and_resumes_bit_by_bit(coco, trained, tmp_path):
    search_output(trained, tmp_path / "pruned.pth")
    teacher = tmp_path / "teacher.pth"
    shutil.copy(trained / "checkpoint_best.pth", teacher)
    start = (FROM_SCRATCH, "--distill_memory_coef 3 --resume", tmp_path / "pruned.pth", "--distill", teacher)
    train(coco, tmp_path / "whole", "--epochs 2", *start)
    line = json.loads((tmp_path / "whole" / "log.txt").read_text().splitlines()[0])
    for name in ("memory", "logits", "logits_0", "bbox", "giou_0"):
        assert line[f"train_loss_distill_{name}"] > 0
    assert not any(name.startswith("test_loss_distill") for name in line)

    train(coco, tmp_path / "parts", "--epochs 1", *start)
    parts = tmp_path / "parts"
    resume = ("--coco_path", coco, "--output_dir", parts, "--resume", parts / "checkpoint.pth",
              "--epochs 2 --num_workers 0 --device cpu")  # fmt: skip
    teacher.rename(tmp_path / "moved.pth")
    with pytest.raises(UserError, match=r"^--distill .*teacher\.pth: no such file, expected a checkpoint$"):
        main.main(*options(*resume))
    (tmp_path / "moved.pth").rename(teacher)
    main.main(*options(*resume))
    resumed, whole = (torch.load(tmp_path / run / "checkpoint.pth", weights_only=True) for run in ("parts", "whole"))
    assert resumed["args"]["distill"] == str(teacher) and resumed["args"]["distill_memory_coef"] == 3
    del resumed["args"], whole["args"]
    assert differing(resumed, whole) == []


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(coco, trained, tmp_path):
    shutil.copy(trained / "checkpoint.pth", tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(engine.NonFiniteLossError, match=r"images \[1\d, 1\d\]"):
        train(coco, tmp_path, "--epochs 9 --lr 1e30 --lr_backbone 1e30 --clip_max_norm 0")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert "loss_giou" in (tmp_path / "run.log").read_text()


def broken(coco: Path, root: Path, change) -> Path:
    """A copy of the data set with `change` applied to the val annotations."""
    shutil.copytree(coco, root)
    path = root / "annotations" / "instances_val2017.json"
    tables = json.loads(path.read_text())
    change(tables)
    path.write_text(json.dumps(tables))
    return root


MISTAKES = {
    "missing checkpoint": ("--resume nowhere.pth", "nowhere.pth: no such file"),
    "folder as checkpoint": ("--resume {tmp}", "found a folder"),
    "truncated checkpoint": ("--resume {tmp}/truncated.pth", "truncated.pth: cannot be read"),
    "text as checkpoint": ("--resume {tmp}/text.pth", "text.pth: cannot be read"),
    "hostile checkpoint": ("--resume {tmp}/hostile.pth", "hostile.pth: cannot be read as a checkpoint (it holds print"),
    "other object": ("--resume {tmp}/list.pth", "list.pth: found no weights"),
    "other model": ("--resume {tmp}/other.pth", "other.pth: found no key transformer.encoder.layers.0"),
    "checkpoint of more layers": ("--resume {ckpt} --enc_layers 4", "--enc_layers 4"),
    "checkpoint of other queries": (f"--resume {{tmp}}/release.pth {TINY} --num_queries 6",
                                    "refpoint_embed.weight has the shape 5 x 4, expected 6 x 4"),
    "checkpoint of other classes": ("--resume {ckpt} --coco_path {tmp}/classes", "for 4 classes, expected 10"),
    "no JSON": ("--cfgs [[[1,", "--cfgs: found no JSON"),
    "too few layers": ("--cfgs [[],[]]", "found 0 encoder layers, expected 6"),
    "too few entries": ("--cfgs [[[8]],[]]", "found [8] for encoder layer 0"),
    "negative width": ("--cfgs [[[-8,32]],[[8,8,8]]] --enc_layers 1 --dec_layers 1", "found width -8"),
    "excess width": ("--cfgs [[[8,4096]],[[8,8,8]]] --enc_layers 1 --dec_layers 1", "found width 4096 for"),
    "no multiple": ("--cfgs [[[12,32]],[[8,8,8]]] --enc_layers 1 --dec_layers 1", "expected a multiple of --nheads 8"),
    "no COCO folder": ("--coco_path {tmp}/nowhere", "nowhere is not a readable folder"),
    "a file as COCO folder": ("--coco_path {tmp}/text.pth", "is not a readable folder (Not a directory)"),
    "a folder without annotations": ("--coco_path {tmp}/no_images/annotations", "val2017.json does not exist"),
    "empty checkpoint": ("--resume=", "--resume: found an empty name"),
    "no images": ("--coco_path {tmp}/no_images", "val2017 is not a readable folder"),
    "annotation to a missing image": ("--coco_path {tmp}/stray_image", "points to image 999"),
    "annotation to a missing category": ("--coco_path {tmp}/stray_category", "points to category 77"),
    "no CUDA": ("--device cuda", "--device cuda: this machine"),
    "no device": ("--device toaster", "--device toaster: not a device"),
    "a file as output folder": ("--output_dir {tmp}/text.pth", "is a file, expected a folder"),
    "a complete run": ("--resume {ckpt}", "2 epochs of its training are done, and --epochs is 2"),
}  # fmt: skip


TEACHERS = {
    "missing": ("nowhere.pth", "--distill nowhere.pth: no such file"),
    "no name": ("", "--distill: found an empty name"),
    "a search's output": ("{tmp}/pruned.pth", "pruned.pth: found the output of a search, expected the detector that"),
    "of the other variant": ("{tmp}/variant.pth", "modelname dn_dab_deformable_detr, expected modelname dn_dab_detr"),
    "of other classes": ("{tmp}/annotated.pth", "num_classes 7, return_layer layer4, expected num_classes 4, return"),
    "of another shape": ("{tmp}/shape.pth", "found enc_layers 2, num_patterns 2, expected enc_layers 1, num"),
    "of another shape, foreign": ("{tmp}/foreign.pth", "refpoint_embed.weight has the shape 6 x 4, expected 5 x 4"),
    "of fewer layers": ("{tmp}/shallow.pth", "found 1 decoder layers, expected at least the student's 2"),
    "not its ancestor": ("{tmp}/stranger.pth", "found other queries than the student's (mean anchor distance 0."),
}  # fmt: skip


@pytest.fixture(scope="module")
def teachers_folder(trained, annotated, tmp_path_factory) -> Path:
    """A folder with the unsuitable files that TEACHERS names."""
    tmp = tmp_path_factory.mktemp("teachers")
    search_output(trained, tmp / "pruned.pth")
    shutil.copy(annotated / "dense.pth", tmp / "annotated.pth")
    for name, more in (
        ("stranger", "--seed 1"),
        ("shape", "--num_patterns 2 --enc_layers 2"),
        ("shallow", "--dec_layers 1"),
        ("query", "--num_queries 6"),
        ("variant", "-m dn_dab_deformable_detr"),
    ):
        args, _ = tiny_options(more)
        args.num_classes = 4
        torch.manual_seed(args.seed)
        model = build_model(args)[0]
        save_checkpoint(tmp / f"{name}.pth", state_dict=model.state_dict(), widths=model.widths,
                        full_widths=model.widths, arguments=vars(args), num_classes=4)  # fmt: skip
    torch.save({"model": read_checkpoint(tmp / "query.pth").state_dict}, tmp / "foreign.pth")
    return tmp


@pytest.mark.parametrize("teacher", TEACHERS)
def test_an_unsuitable_teacher_is_a_one_line_error_and_nothing_is_written(
    teacher, coco, trained, teachers_folder, tmp_path
):
    path, message = TEACHERS[teacher]
    args, typed = tiny_options("--coco_path", coco, "--output_dir", tmp_path, "--start_fresh", "--resume",
                               trained / "checkpoint.pth")  # fmt: skip
    args.distill = path.format(tmp=teachers_folder)
    with pytest.raises(UserError) as error:
        main.main(args, {*typed, "distill"})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("--distill") and list(tmp_path.iterdir()) == []


class Hostile:
    """Unpickles to a call of `print`."""

    def __reduce__(self):
        return print, ("it ran",)


@pytest.fixture(scope="module")
def mistakes_folder(coco, trained, tmp_path_factory) -> Path:
    """A folder with the damaged files that MISTAKES names."""
    tmp = tmp_path_factory.mktemp("mistakes")
    content = (trained / "checkpoint_best.pth").read_bytes()
    (tmp / "truncated.pth").write_bytes(content[: len(content) // 2])
    (tmp / "text.pth").write_text("weights, but in words")
    torch.save({"model": Hostile()}, tmp / "hostile.pth")
    torch.save([1, 2], tmp / "list.pth")
    torch.save({"model": {"fc.weight": torch.zeros(2)}}, tmp / "other.pth")
    torch.save({"model": read_checkpoint(trained / "checkpoint.pth").state_dict}, tmp / "release.pth")
    broken(coco, tmp / "classes", lambda tables: tables["categories"].append({"id": 9, "name": "ninth"}))
    broken(coco, tmp / "stray_image", lambda tables: tables["annotations"][0].update(image_id=999))
    broken(coco, tmp / "stray_category", lambda tables: tables["annotations"][0].update(category_id=77))
    shutil.rmtree(broken(coco, tmp / "no_images", lambda tables: None) / "val2017")
    return tmp


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_one_line_error_and_nothing_is_written(mistake, coco, trained, mistakes_folder, tmp_path):
    if mistake == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    words, message = MISTAKES[mistake]
    words = words.format(tmp=mistakes_folder, ckpt=trained / "checkpoint.pth")
    (tmp_path / "log.txt").write_text("a line of an earlier run\n")
    eval_or_train = "" if mistake == "a complete run" else "--eval"
    with pytest.raises(UserError) as error:
        main.main(
            *options(
                "--coco_path",
                coco,
                "--output_dir",
                tmp_path,
                "--num_workers 0 --no-pretrained_backbone",
                eval_or_train,
                words,
            )
        )
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_the_script_ends_with_exit_code_2_and_one_line(tmp_path):
    command = [sys.executable, "main.py", "--resume", "nowhere.pth", "--output_dir", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr == "error: nowhere.pth: no such file, expected a checkpoint\n"
    assert not (tmp_path / "out").exists()


def test_a_corrupt_image_is_named_by_a_worker_process_too(coco, tmp_path):
    root = write_coco(tmp_path / "coco")
    (root / "val2017" / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2\.jpg cannot be read as an image") as error:
        main.main(*tiny_options("--eval --num_workers 1 --coco_path", root, "--output_dir", tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_two_processes_resume_a_run_with_the_results_of_one(annotated, tmp_path):
    """One step on a batch of two, or on a batch of one in each of two processes; one of 7 images comes twice to AP."""
    teacher = torch.load(annotated / "dense.pth", weights_only=True)
    torch.manual_seed(0)
    for value in teacher["model"].values():
        value += 0.02 * torch.randn_like(value)
    torch.save(teacher, tmp_path / "teacher.pth")
    common = [f"{SLOW} --epochs 3 --distill {tmp_path}/teacher.pth --coco_path", annotated, "--resume",
              annotated / "run" / "checkpoint.pth"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, RUN_SCRIPT, "main.py"]
    command += [*common[0].split(), *common[1:], "--batch_size", "1", "--output_dir", tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True, capture_output=True, timeout=200)
    line = json.loads((tmp_path / "two" / "log.txt").read_text())
    assert line["epoch"] == 2 and line["test_AP"] > 0.1 and line["train_loss_distill_bbox"] > 0
    one = main.main(*options("--eval --batch_size 1 --device cpu --num_workers 0 --coco_path", annotated, "--resume",
                             tmp_path / "two" / "checkpoint.pth", "--output_dir", tmp_path / "eval"))  # fmt: skip
    assert one == pytest.approx({name: line[f"test_{name}"] for name in one}, abs=1e-9)

    main.main(*options(*common, "--batch_size 2 --output_dir", tmp_path / "one"))
    moments = [read_checkpoint(tmp_path / name / "checkpoint.pth").training["optimizer"]["state"]
               for name in ("one", "two")]  # fmt: skip
    before = read_checkpoint(annotated / "run" / "checkpoint.pth").training["optimizer"]["state"]
    alone, together = (torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)]) for state in moments)
    gradient = alone - 0.9 * torch.cat([before[i]["exp_avg"].flatten() for i in sorted(before)])
    assert float(gradient.norm()) > 0
    assert float((alone - together).norm()) < 1e-3 * float(gradient.norm())
