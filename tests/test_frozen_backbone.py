"""`--lr_backbone 0`: the backbone is frozen, in one process and in several, and resumed as any run."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import main
from runs.training_state import parameter_groups
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector
from tests.tiny_run import options, tiny_options
from tests.trust.forked import job, run_jobs
from tests.trust.test_exact import differing

BATCH_NORM = "--batch_norm_type BatchNorm2d"
FROZEN = f"{BATCH_NORM} --lr_backbone 0"


def train(coco: Path, out: Path, words: str) -> dict:
    """Train the tiny detector; returns the content of its checkpoint."""
    main.main(*tiny_options("--coco_path", coco, "--output_dir", out, words))
    return torch.load(out / "checkpoint.pth", weights_only=True)


def resume_run(coco: Path, out: Path, words: str = "") -> dict:
    main.main(*options("--coco_path", coco, "--output_dir", out, "--resume", out / "checkpoint.pth",
                       f"--num_workers 0 --device cpu {words}"))  # fmt: skip
    return torch.load(out / "checkpoint.pth", weights_only=True)


def backbone_of(content: dict) -> dict:
    return {name: value for name, value in content["model"].items() if name.startswith("backbone.")}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", ["FrozenBatchNorm2d", "BatchNorm2d"])
def test_a_frozen_backbone_has_no_gradient_and_stays_in_eval_mode(variant, norm):
    model, criterion, _ = tiny_detector(f"{VARIANTS[variant]} --lr_backbone 0 --batch_norm_type {norm}")
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    images, targets = pictures()
    features = []
    model.train()
    model.backbone[0].body["layer3"].register_forward_hook(lambda module, inputs, found: features.append(found))
    criterion.weighted_sum(criterion(model(images, targets), targets)).backward()
    assert features and not any(found.requires_grad for found in features)
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert any(parameter.grad is not None for parameter in model.transformer.parameters())
    after = model.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.training and not any(module.training for module in model.backbone[0].modules())


@pytest.mark.parametrize("norm", ["FrozenBatchNorm2d", "BatchNorm2d"])
def test_the_optimizer_has_the_same_parameters_frozen_or_not(norm):
    names = []
    for rate in ("0", "1e-5"):
        model = tiny_detector(f"--lr_backbone {rate} --batch_norm_type {norm}")[0]
        known = {parameter: name for name, parameter in model.named_parameters()}
        names.append([[known[p] for p in group["params"]] for group in parameter_groups(model, 1, 1)])
    frozen, trained = names
    assert frozen == trained
    stem_and_layer1 = {"conv1", "bn1", "layer1"} & {name.split(".")[3] for name in trained[1]}
    assert bool(stem_and_layer1) == (norm == "BatchNorm2d")


def test_its_gradient_has_no_share_in_the_clipping_norm(coco, tmp_path, monkeypatch):
    counts, norm_of = [], nn.utils.get_total_norm

    def count(gradients):
        gradients = list(gradients)
        counts.append(len(gradients))
        return norm_of(gradients)

    monkeypatch.setattr(nn.utils, "get_total_norm", count)
    content = train(coco, tmp_path, f"{FROZEN} --epochs 1")
    transformer, backbone = (len(group["params"]) for group in content["optimizer"]["param_groups"])
    # `label_enc`, for example, has a gradient in every batch with targets; the backbone has none.
    assert 0 < max(counts) <= transformer and backbone > 0


def test_a_frozen_backbone_is_unchanged_and_the_run_resumes_exactly(coco, tmp_path):
    start = train(coco, tmp_path / "start", f"{BATCH_NORM} --epochs 1 --lr 0 --weight_decay 0 --lr_backbone 1e-3")
    words = f"{FROZEN} --ema_decay 0.9 --start_fresh --resume {tmp_path}/start/checkpoint.pth"
    whole = train(coco, tmp_path / "whole", f"{words} --epochs 2")
    assert differing(backbone_of(start), backbone_of(whole)) == []
    assert differing(start["model"], whole["model"]) != []
    transformer = len(whole["optimizer"]["param_groups"][0]["params"])
    assert set(whole["optimizer"]["state"]) <= set(range(transformer))
    train(coco, tmp_path / "parts", f"{words} --epochs 1")
    parts = resume_run(coco, tmp_path / "parts", "--epochs 2")
    assert differing(*({**content, "args": None} for content in (whole, parts))) == []


def test_a_run_may_be_resumed_with_the_backbone_frozen_and_no_longer_frozen(coco, tmp_path):
    first = train(coco, tmp_path, f"{BATCH_NORM} --epochs 1 --lr_backbone 1e-3")
    second = resume_run(coco, tmp_path, "--epochs 2 --lr_backbone 0")
    assert differing(backbone_of(first), backbone_of(second)) == []
    assert "--lr_backbone 0.001 -> 0.0" in (tmp_path / "run.log").read_text()
    third = resume_run(coco, tmp_path, "--epochs 3 --lr_backbone 1e-3")
    assert differing(backbone_of(second), backbone_of(third)) != []
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["lr_backbone"] for line in lines] == [1e-3, 0, 1e-3]


def test_several_processes_train_with_a_frozen_backbone(coco, tmp_path):
    words = "--epochs 1 --lr_backbone 1e-3 --lr 0 --weight_decay 0"
    start = train(coco, tmp_path / "start", f"{BATCH_NORM} {words}")
    words = f"--coco_path {coco} --output_dir {tmp_path}/out --resume {tmp_path}/start/checkpoint.pth --start_fresh"
    words += f" {FROZEN} --epochs 2 --ema_decay 0.9 --batch_size 1 --num_workers 0 --device cpu"
    run_jobs(tmp_path / "jobs.json", [job(2, "main", words)])
    content = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert content["epoch"] == 2 and differing(backbone_of(start), backbone_of(content)) == []
    assert differing(start["model"], content["model"]) != []
