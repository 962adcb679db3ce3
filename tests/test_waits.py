"""On a GPU the CPU waits once a training step, for the costs that it matches by; what it sees late is checked, too."""

import itertools
import math

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou_loss

import engine
from models.denoising_queries import DenoisingSettings
from models.distillation import QUERIES, Distillation
from models.matcher import giou_loss
from runs.batch_log import BatchLog
from tests.other_device import DEVICE, OtherDevice, held
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector
from tests.soak import rest_in_soak
from util.ema import WeightAverage
from util.errors import NonFiniteLossError

CPU = torch.device("cpu")
BATCHES = 2
WEIGHTS = {"loss_distill_logits": 1.0, "loss_distill_bbox": 5.0, "loss_distill_giou": 2.0, "loss_distill_memory": 3.0}


def batches(count: int) -> list:
    """Batches of two images of two sizes."""
    found = [pictures(seed=seed) for seed in range(count)]
    for number, (_, targets) in enumerate(found):
        for place, target in enumerate(targets):
            target["image_id"] = torch.tensor(10 * number + place)
    return found


def teaching(student, words: str) -> Distillation:
    """A teacher of every kind of queries."""
    teacher, layers = tiny_detector(words, seed=1)[0], len(student.widths.decoder)
    return Distillation(teacher, WEIGHTS, layers, None, tuple(QUERIES), DenoisingSettings(groups=2), student)


def train(words: str, distils: bool = False, device: torch.device = CPU, **options) -> tuple[dict, list[str]]:
    """Losses of an epoch, and what the CPU waited for."""
    model, criterion, _ = tiny_detector(words)
    teacher = teaching(model, words) if distils else None
    with OtherDevice() as other:
        if device == DEVICE:
            other.move(model)
            if teacher is not None:
                other.move(teacher.teacher)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        average = WeightAverage(model, 0.9)
        other.waits.clear()
        torch.manual_seed(0)
        losses = engine.train_one_epoch(
            model, criterion, batches(BATCHES), optimizer, device=device, clip_max_norm=0.1, weight_average=average,
            distillation=teacher, progress=False, **options,
        )  # fmt: skip
    return losses, other.waits


# Variant, options, and whether it distils.
STEPS = [(v, words, d) for v in VARIANTS for words in ("", "--dec_layers 1", "--no-use_dn") for d in (False, True)]
QUICK = [("dense", "", True), ("deformable", "", False)]


@pytest.mark.filterwarnings("ignore:no compiled sampling")
@pytest.mark.parametrize(("variant", "more", "distils"), rest_in_soak(STEPS, QUICK))
def test_a_step_waits_for_the_costs_of_matching_alone(variant, more, distils):
    """One wait a batch, and one for the means at the end; the loss is that of the CPU."""
    words = f"{VARIANTS[variant]} {more}"
    losses, waits = train(words, distils, DEVICE)
    assert [wait.split(":")[0] for wait in waits] == ["models/matcher.py"] * BATCHES + ["engine.py"], waits
    assert losses["loss"] == pytest.approx(train(words, distils)[0]["loss"], rel=1e-3)


@pytest.mark.parametrize(("every", "reads"), [(1, BATCHES), (2, 1)])
def test_the_log_waits_once_for_each_of_its_lines(every, reads):
    """Batches of one step, too."""
    shown: list = []
    log = BatchLog(every, 0, 1, BATCHES, lambda values, done: shown.append(done))

    def on_batch(losses, images, rates):
        log(losses, images, rates[0])

    waits = train("", device=DEVICE, accumulate=2, on_batch=on_batch)[1]
    assert len(shown) == reads and len(waits) == BATCHES + 1 + reads


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("what", ["loss is nan", "loss is inf", "the gradient is not finite"])
def test_a_step_that_is_not_finite_changes_no_weight_and_is_not_reported(what, at):
    """Batch 2 of 3, whose error is seen after the next has been matched, and the last one."""
    model, criterion, _ = tiny_detector()
    weighted_sum, calls, reported = criterion.weighted_sum, itertools.count(), []
    kept: list[dict] = []
    zero = next(model.class_embed.parameters())
    # A loss without gradient, or 0 with an infinite one: the square root of 0.
    added = {"loss is nan": lambda: math.nan, "loss is inf": lambda: math.inf}

    def spoilt(losses):
        kept.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        if next(calls) != at:
            return weighted_sum(losses)
        return weighted_sum(losses) + added.get(what, lambda: (0 * zero.sum()).abs().sqrt())()

    criterion.weighted_sum = spoilt
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    message = rf"^epoch 0, step {at + 1} of 3: {what}, on the images \[{10 * at}, {10 * at + 1}\]$"
    with pytest.raises(NonFiniteLossError, match=message):
        engine.train_one_epoch(
            model, criterion, batches(3), optimizer, device=CPU, progress=False,
            on_batch=lambda losses, images, rates: reported.append(float(losses["loss"])),
        )  # fmt: skip
    assert len(reported) == at and all(map(math.isfinite, reported))
    assert all(torch.equal(parameter, kept[at][name]) for name, parameter in model.named_parameters())
    assert not all(torch.equal(kept[at][name], kept[at - 1][name]) for name in kept[at])
    assert {float(state["step"]) for state in optimizer.state.values()} == {float(at)}


@pytest.mark.parametrize("apart", [0.0, 0.1, 1.0])
def test_giou_and_its_gradient_are_those_of_torchvision(apart):
    """Also where boxes do not overlap, touch, or have no area."""
    generator = torch.Generator().manual_seed(0)
    boxes, others = (torch.rand(200, 4, generator=generator) * 0.5 for _ in range(2))
    others[:, :2] += apart
    boxes[:10, 2:], others[5:15, 2:] = 0, 0
    others[20:30] = boxes[20:30]
    others[30:40] = boxes[30:40] + boxes[30:40, 2:].repeat(1, 2) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    pairs = [tensor.clone().requires_grad_() for tensor in (boxes, others)]
    expected = generalized_box_iou_loss(*(box_convert(pair, "cxcywh", "xyxy") for pair in pairs))
    found = giou_loss(*pairs)
    assert torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad(loss.sum(), pairs) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    grid = giou_loss(boxes[:, None], others[None])
    assert torch.equal(grid.diagonal(), expected)


WAITS = {
    "a number": lambda tensor: float(tensor.sum()),
    "a truth": lambda tensor: bool(tensor.any()),
    "a copy to the CPU": lambda tensor: tensor.cpu(),
    "a list": lambda tensor: tensor.cpu().tolist(),
    "places of numbers": lambda tensor: tensor.nonzero(),
    "a mask as index": lambda tensor: tensor[tensor > 1],
    "numbers set by a mask": lambda tensor: tensor.__setitem__(tensor > 1, 0.0),
    "a list as index": lambda tensor: tensor[[0, 2]],
    "an index of the CPU": lambda tensor: tensor[torch.tensor([0, 2])],
    "a copy from the CPU": lambda tensor: torch.ones(3).to(DEVICE),
    "a tensor of a list": lambda tensor: torch.tensor([1.0, 2.0], device=DEVICE),
    "numbers from the CPU": lambda tensor: tensor.copy_(torch.ones(3)),
    "repeats of a tensor": lambda tensor: tensor.repeat_interleave(tensor.long()),
}
FREE = {
    "a sum": lambda tensor: tensor.sum() + tensor.mean(),
    "a new tensor": lambda tensor: torch.zeros(3, device=DEVICE) + tensor.new_ones(3),
    "a copy that is not awaited": lambda tensor: torch.ones(3).to(DEVICE, non_blocking=True) + tensor,
    "a copy back that is not awaited": lambda tensor: tensor.to("cpu", non_blocking=True),
    "an index of the device": lambda tensor: tensor[torch.arange(2, device=DEVICE)],
    "a choice": lambda tensor: torch.where(tensor > 1, tensor, -tensor),
    "a fill": lambda tensor: tensor.masked_fill(tensor > 1, 0.0),
    "a slice": lambda tensor: tensor[1:].add_(1),
}


@pytest.mark.parametrize("name", [*WAITS, *FREE])
def test_the_other_device_notes_what_waits(name):
    with OtherDevice() as other:
        tensor = torch.arange(3.0).to(DEVICE, non_blocking=True)
        {**WAITS, **FREE}[name](tensor)
    assert len(other.waits) == (name in WAITS), other.waits


def test_the_other_device_computes_and_refuses_tensors_of_two_devices():
    with OtherDevice():
        tensor = torch.arange(3.0).to(DEVICE).requires_grad_()
        (tensor[1:] ** 2).sum().backward()
        assert held(tensor.grad).tolist() == [0.0, 2.0, 4.0]
        assert tensor.grad.device == DEVICE
        with pytest.raises(AssertionError, match="of tensors of two devices"):
            tensor + torch.ones(3)
