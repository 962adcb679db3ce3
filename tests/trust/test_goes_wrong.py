"""Training that goes wrong says what and where, and keeps the last good checkpoint; odd data is no reason to stop."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

import engine
import main
from datasets.coco import annotation_path, build_dataset
from datasets.transforms import RandomSizeCrop
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector
from tests.tiny_run import TINY, run_script, tiny_options
from util.batch_record import BatchRecord
from weights.checkpoint_file import read_checkpoint

CPU = torch.device("cpu")


def train(model, criterion, loader, **options):
    """One epoch with plain options; the mean losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return engine.train_one_epoch(model, criterion, loader, optimizer, device=CPU, progress=False, **options)


def batch(counts: tuple[int, ...], label: int | None = None, first_id: int = 0) -> tuple[list, list]:
    """Images with that many boxes each, of random classes or all of one."""
    generator = torch.Generator().manual_seed(sum(counts))
    images, targets = pictures(((64, 64), (64, 96)) * (len(counts) // 2) + ((64, 64),) * (len(counts) % 2))
    for number, (target, count) in enumerate(zip(targets, counts, strict=True)):
        target["boxes"] = 0.1 + 0.3 * torch.rand(count, 4, generator=generator)
        labels = torch.randint(1, 7, (count,), generator=generator)
        target["labels"] = labels if label is None else torch.full((count,), label)
        target["image_id"] = torch.tensor(first_id + number)
    return images, targets


# Two batches each, of a detector with 5 queries and 7 classes.
ODD = {
    "a class that never occurs": [batch((2, 1), label=3), batch((1, 3), label=3)],
    "more targets than queries": [batch((9, 2)), batch((6, 40))],
    "a batch without targets": [batch((0, 0)), batch((2, 1))],
    "no targets at all": [batch((0, 0)), batch((0, 0))],
    "one image without targets": [batch((0, 3)), batch((4, 0))],
    "batches of one": [batch((1,)), batch((0,))],
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ODD)
def test_odd_targets_train_on(variant, case):
    model, criterion, _ = tiny_detector(VARIANTS[variant])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = train(model, criterion, ODD[case], clip_max_norm=0.1)
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values())
    assert losses["loss"] > 0
    boxes = sum(len(target["labels"]) for _, targets in ODD[case] for target in targets)
    assert (losses["loss_giou"] > 0) == (losses["tgt_loss_giou"] > 0) == (boxes > 0)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("class_embed") for name in changed)


def test_more_targets_than_queries_match_every_query_to_another_target():
    model, criterion, _ = tiny_detector()
    images, targets = batch((9, 2))
    outputs = model.train()(images, targets)
    layers = [*outputs["aux_outputs"], outputs]
    logits, boxes = (torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes"))
    matches = criterion.matcher(logits, boxes, targets)
    for layer in range(len(layers)):
        of_first = (matches.layer == layer) & (matches.image == 0)
        assert matches.query[of_first].sort().values.tolist() == [0, 1, 2, 3, 4]
        assert len(matches.target[of_first].unique()) == 5 and int(matches.target[of_first].max()) < 9


def test_boxes_that_augmentation_puts_outside_leave_images_without_targets_that_train_on(coco, tmp_path, monkeypatch):
    """Every crop is the lower right corner, and every box lies in the upper left one."""
    root = shutil.copytree(coco, tmp_path / "coco")
    path = annotation_path(root, "train2017")
    tables = json.loads(path.read_text())
    for item in tables["annotations"]:
        item.update(bbox=[1, 1, 8, 8], area=64)
    path.write_text(json.dumps(tables))

    def corner(self, flat_inputs):
        return {"top": 32, "left": 32, "height": 32, "width": 32}

    monkeypatch.setattr(RandomSizeCrop, "make_params", corner)
    monkeypatch.setattr("torchvision.transforms.v2.RandomHorizontalFlip.transform", lambda self, inpt, params: inpt)
    args, typed = tiny_options("--coco_path", root, "--output_dir", tmp_path / "out", "--epochs 4")
    dataset = build_dataset("train2017", args, augmentation=args.augmentation)
    counts = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        counts += [len(target["labels"]) for _, target in dataset]
    assert 0 in counts[:3] and max(counts) == 2
    main.main(args, typed)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert len(lines) == 4 and all(line["train_loss"] > 0 for line in lines)


@pytest.mark.parametrize(("loss", "poison"), [("loss_ce", "class_embed"), ("loss_bbox", "bbox_embed")])
def test_a_loss_that_is_not_finite_is_named_with_epoch_step_and_images(loss, poison):
    """The first batch trains; the second has one image of NaN, or comes after a weight has become NaN."""
    model, criterion, _ = tiny_detector("--enc_layers 1 --dec_layers 1")
    head = getattr(model, poison)

    def batches():
        yield batch((1, 2))
        with torch.no_grad():
            next(head.parameters()).fill_(float("nan"))
        yield batch((2, 1), first_id=5)

    class Loader:
        def __len__(self):
            return 2

        def __iter__(self):
            return batches()

    said = rf"^epoch 3, step 2 of 2: {loss} is nan, on the images \[5, 6\]$"
    with pytest.raises(engine.NonFiniteLossError, match=said):
        train(model, criterion, Loader(), epoch=3)


def test_a_gradient_that_is_not_finite_is_named_and_changes_no_weight():
    """The loss is finite, its gradient infinite: the square root of 0."""
    model, criterion, _ = tiny_detector()
    weighted_sum = criterion.weighted_sum
    zero = next(model.class_embed.parameters())
    criterion.weighted_sum = lambda losses: weighted_sum(losses) + (0 * zero.sum()).abs().sqrt()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loader = [batch((1, 2)), batch((2, 1), first_id=5)]
    said = r"^epoch 0, step 2 of 2: the gradient is not finite, on the images \[0, 1, 5, 6\]$"
    for clip in (0.0, 0.1):
        with pytest.raises(engine.NonFiniteLossError, match=said):
            train(model, criterion, loader, accumulate=2, clip_max_norm=clip)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_gradient_that_no_scale_makes_finite_ends_training_under_fp16():
    weight = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(weight.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4 * engine.LEAST_SCALE)
    before = weight.weight.detach().clone()
    targets = [{"image_id": torch.tensor(7)}]
    average, scheduler, tried = mock.Mock(), mock.Mock(), 0
    with pytest.raises(engine.NonFiniteLossError, match=r"^here: the gradient is not finite, on the images \[7\]$"):
        while tried < 10:
            tried += 1
            scaler.scale(float("nan") * weight(torch.ones(1, 1)).sum()).backward()
            batch = BatchRecord({"loss": torch.tensor(1.0)}, targets, [1.0], "here")
            engine._optimizer_step(weight, optimizer, scheduler, 0.1, scaler, average, batch, targets)
    assert tried == 3 and scheduler.step.call_count == 2 and torch.equal(weight.weight, before)
    assert not average.update.called


@pytest.fixture(scope="module")
def good(coco, tmp_path_factory) -> Path:
    """Folder of a run of one good epoch."""
    out = tmp_path_factory.mktemp("good")
    main.main(*tiny_options("--coco_path", coco, "--output_dir", out, "--epochs 1"))
    return out


def test_the_script_names_what_is_not_finite_ends_with_code_1_and_keeps_the_epoch_before(coco, good, tmp_path):
    """No traceback; what it leaves goes on as if the bad run had not been."""
    for name in ("checkpoint.pth", "checkpoint_best.pth", "log.txt"):
        shutil.copy(good / name, tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = f"{TINY} --coco_path {coco} --output_dir {tmp_path} --resume {tmp_path}/checkpoint.pth --epochs 3 "
    words += "--lr 1e30 --lr_backbone 1e30 --clip_max_norm 0 --batch_size 2"
    code, said = run_script("main.py", words)
    assert code == 1
    assert said.splitlines()[-1].startswith("error: epoch 1, step 2 of 2: loss_ce_0 is nan, on the images [1"), said
    assert "Traceback" not in said
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert "loss_giou" in (tmp_path / "run.log").read_text()
    assert read_checkpoint(tmp_path / "checkpoint.pth").training["epoch"] == 1
    main.main(*tiny_options("--coco_path", coco, "--output_dir", tmp_path, "--resume", tmp_path / "checkpoint.pth",
                            "--epochs 2"))  # fmt: skip
    assert read_checkpoint(tmp_path / "checkpoint.pth").training["epoch"] == 2


def test_weights_that_the_last_step_of_an_epoch_has_ruined_are_not_saved(coco, good, tmp_path):
    """One step an epoch: its loss is good, and what comes of it is seen on val2017."""
    shutil.copy(good / "checkpoint.pth", tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    words = (
        "--epochs 3 --batch_size 4 --lr 1e30 --lr_backbone 1e30 --clip_max_norm 0 --resume",
        good / "checkpoint.pth",
    )
    with pytest.raises(engine.NonFiniteLossError, match=r"^epoch 1: evaluation: scores or boxes are not finite, on"):
        main.main(*tiny_options("--coco_path", coco, "--output_dir", tmp_path, *words))
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
