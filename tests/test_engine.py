"""The loops: gradients of accumulated batches, what evaluation measures, what a bad loss does."""

import numpy as np
import pytest
import torch
from torch import nn

import engine
from datasets.coco_eval import GroundTruth
from util.ema import WeightAverage
from util.errors import UserError

CPU = torch.device("cpu")


class Linear(nn.Module):
    """A "detector" whose output is a weighted sum of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0]))

    def forward(self, images, targets=None):
        return {"sums": torch.stack(images) @ self.weight}


class MeanSquare(nn.Module):
    """Losses of the sums, averaged over the images of a batch."""

    def forward(self, outputs, targets):
        return {"loss_square": (outputs["sums"] ** 2).mean(), "loss_sum": outputs["sums"].mean()}

    def weighted_sum(self, losses):
        return losses["loss_square"] + 0.5 * losses["loss_sum"]


def batches(images: int, size: int, seed: int = 0) -> list:
    """Images of two numbers each, in batches of `size`; image i has the id i."""
    numbers = torch.randn(images, 2, generator=torch.Generator().manual_seed(seed))
    pairs = [(image, {"image_id": torch.tensor(i)}) for i, image in enumerate(numbers)]
    groups = [pairs[start : start + size] for start in range(0, images, size)]
    return [([image for image, _ in group], [target for _, target in group]) for group in groups]


def train(loader: list, **options) -> tuple[torch.Tensor, dict]:
    """Weights after one epoch of plain descent, and the losses."""
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = engine.train_one_epoch(model, MeanSquare(), loader, optimizer, device=CPU, progress=False, **options)
    return model.weight.detach(), losses


@pytest.mark.parametrize("images", [8, 12, 4, 2])
def test_accumulated_batches_step_like_one_large_batch(images):
    """12 images leave a group of one batch of 2 behind two groups of 2 batches: it steps as a batch of 2."""
    small, _ = train(batches(images, 2), accumulate=2)
    large, _ = train(batches(images, 4))
    assert torch.allclose(small, large, atol=1e-6)


def test_a_last_group_that_is_not_full_is_averaged_over_what_it_holds():
    three = batches(6, 2)
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for group in (three[:2], three[2:]):
        loss = sum(MeanSquare().weighted_sum(MeanSquare()(model(*batch), None)) for batch in group) / len(group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(train(three, accumulate=2)[0], model.weight, atol=1e-6)


def test_losses_are_means_over_the_batches():
    _, losses = train(batches(4, 2), clip_max_norm=1e-12)
    model = Linear()
    expected = [MeanSquare()(model(*batch), None) for batch in batches(4, 2)]
    for name in ("loss_square", "loss_sum"):
        assert losses[name] == pytest.approx(float(sum(loss[name].detach() for loss in expected)) / 2, abs=1e-6)
    assert losses["loss"] == pytest.approx(losses["loss_square"] + 0.5 * losses["loss_sum"], abs=1e-6)


def test_clipping_bounds_the_step():
    weights, _ = train(batches(4, 4), clip_max_norm=0.01)
    assert float((weights - Linear().weight.detach()).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(value):
    loader = batches(4, 2)
    loader[1][0][1].fill_(value)
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(engine.NonFiniteLossError, match=r"\[2, 3\]"):
        engine.train_one_epoch(model, MeanSquare(), loader, optimizer, device=CPU, accumulate=2, progress=False)
    assert torch.equal(model.weight, Linear().weight)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_steps_close_to_full_precision(amp):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if amp == "fp16" else None
    mixed, _ = train(batches(8, 2), amp=amp, scaler=scaler, clip_max_norm=1.0)
    full, _ = train(batches(8, 2), clip_max_norm=1.0)
    assert mixed.dtype == torch.float32 and torch.allclose(mixed, full, atol=0.02)


class Towards:
    """A "distillation" that draws the sums towards those of another weight; notes how the teacher was run."""

    def __init__(self, weight: list[float]) -> None:
        self.weight = torch.tensor(weight)
        self.autocast: set[bool] = set()

    def draw(self, targets):
        return targets

    def begin(self, images):
        return images

    def teach(self, images, queries):
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return torch.stack(images) @ self.weight

    def __call__(self, outputs, lesson):
        return {"loss_distill_sums": (outputs["sums"] - lesson).square().mean()}

    def weighted_sum(self, losses):
        return 3 * losses["loss_distill_sums"]


def test_a_teachers_losses_join_the_gradient_and_the_log():
    loader = batches(8, 4)[:1]
    weights, losses = train(loader, distillation=Towards([1.0, 1.0]))
    model = Linear()
    found = MeanSquare()(model(*loader[0]), None)
    towards = (torch.stack(loader[0][0]) @ (model.weight - torch.ones(2))).square().mean()
    loss = MeanSquare().weighted_sum(found) + 3 * towards
    (gradient,) = torch.autograd.grad(loss, [model.weight])
    assert torch.allclose(weights, model.weight.detach() - 0.1 * gradient, atol=1e-6)
    assert losses["loss_distill_sums"] == pytest.approx(float(towards.detach()), rel=1e-5)
    assert losses["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_a_teacher_runs_in_the_precision_of_the_student_and_with_accumulated_batches():
    small, _ = train(batches(8, 2), accumulate=2, distillation=Towards([1.0, 0.0]))
    large, _ = train(batches(8, 4), distillation=Towards([1.0, 0.0]))
    assert torch.allclose(small, large, atol=1e-6)
    for amp, expected in (("bf16", {True}), ("off", {False})):
        towards = Towards([1.0, 0.0])
        train(batches(8, 4), distillation=towards, amp=amp)
        assert towards.autocast == expected


def test_averaged_weights_follow_after_every_step():
    model = Linear()
    average = WeightAverage(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.train_one_epoch(model, MeanSquare(), batches(4, 2), optimizer, device=CPU, accumulate=2,
                           weight_average=average, progress=False)  # fmt: skip
    start = Linear().weight.detach()
    # After the first step the copy moves by 1 - (1 + 1) / (10 + 1).
    assert average.steps == 1
    assert torch.allclose(average.model.weight, start + (model.weight.detach() - start) * 9 / 11, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # AdamW, fused, is called in any case
def test_a_step_that_overflows_moves_the_schedule_but_no_average():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    average = WeightAverage(model, decay=0.5)
    # At this scale the first gradients are infinite; the scale falls to 1 and the second step is taken.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-127)
    engine.train_one_epoch(model, MeanSquare(), batches(4, 2), optimizer, device=CPU, scaler=scaler,
                           scheduler=scheduler, weight_average=average, progress=False)  # fmt: skip
    assert scaler.get_scale() == 1 and not torch.equal(model.weight, Linear().weight)
    assert (scheduler.last_epoch, average.steps) == (2, 1)


def test_each_batch_is_reported_with_the_rates_of_its_step():
    model, seen = Linear(), []
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [], "lr": 0.01}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    engine.train_one_epoch(model, MeanSquare(), batches(6, 2), optimizer, device=CPU, accumulate=2,
                           scheduler=scheduler, progress=False,
                           on_batch=lambda losses, images, rates: seen.append((images, rates)))  # fmt: skip
    assert seen == [(2, [0.1, 0.01]), (2, [0.1, 0.01]), (2, [0.05, 0.005])]


GROUND_TRUTH = {
    "images": [{"id": i, "width": 100, "height": 50} for i in (4, 7, 9)],
    "categories": [{"id": 2}, {"id": 5}],
    "annotations": [
        {"id": 1, "image_id": 4, "category_id": 2, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0},
    ],
}


def found(image_id: int) -> dict:
    """The perfect detections of an image, as a predictor's outputs."""
    items = [item for item in GROUND_TRUTH["annotations"] if item["image_id"] == image_id]
    boxes = torch.tensor([item["bbox"] for item in items], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([item["category_id"] for item in items], dtype=torch.int64)
    return {"scores": torch.ones(len(items)), "labels": labels, "boxes": boxes}


def evaluate(image_ids: tuple[int, ...], **options) -> engine.EvalResult:
    """Evaluate a plain function that finds everything, one image a batch."""
    loader = [(i, [{"image_id": torch.tensor(i), "orig_size": torch.tensor([50, 100])}]) for i in image_ids]

    def postprocess(outputs, sizes):
        assert sizes.tolist() == [[50, 100]]
        return [found(outputs["image"])]

    return engine.evaluate(lambda image: {"image": image}, postprocess, iter(loader), GroundTruth(GROUND_TRUTH),
                           device=CPU, progress=False, **options)  # fmt: skip


@pytest.mark.parametrize("backend", [None, "pycocotools"])
def test_perfect_detections_of_any_callable_give_one(backend):
    result = evaluate((9, 4, 7), backend=backend)
    assert len(result.stats) == 12 and result.stats["AP"] == pytest.approx(1) and result.losses == {}
    assert result.image_ids == [4, 7, 9] and result.detections.shape == (2, 7)


def test_only_the_images_seen_are_counted_and_each_of_them_once():
    result = evaluate((4, 4))
    assert result.stats["AP"] == pytest.approx(1) and len(result.detections) == 1
    assert evaluate(()).stats["AP"] == -1
    with pytest.raises(UserError, match=r"^--ap_by_layer: found no images, expected at least one$"):
        evaluate((), by_layer=True)


def test_evaluation_leaves_the_mode_of_a_module_and_weights_losses_by_images():
    model, seen = Linear().train(), []
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    loader = [
        (images, [{**t, "orig_size": torch.tensor([5, 5])} for t in targets]) for images, targets in batches(3, 2)
    ]
    truth = GroundTruth({**GROUND_TRUTH, "images": [{"id": 0}, {"id": 1}, {"id": 2}], "annotations": []})
    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0), "boxes": torch.zeros(0, 4)}
    result = engine.evaluate(model, lambda outputs, sizes: [nothing] * len(sizes), loader, truth, device=CPU,
                             criterion=MeanSquare(), progress=False)  # fmt: skip
    assert model.training and seen == [False, False]
    assert set(result.losses) == {"loss", "loss_square", "loss_sum"}
    # The last batch is of one image and counts as one.
    all_at_once = MeanSquare()(model(*batches(3, 3)[0]), None)
    assert result.losses["loss_square"] == pytest.approx(float(all_at_once["loss_square"].detach()), abs=1e-6)


def test_results_json_has_plain_numbers():
    rows = np.array([[4, 1.5, 2, 3, 4, 0.25, 2]])
    expected = {"image_id": 4, "category_id": 2, "bbox": [1.5, 2, 3, 4], "score": 0.25}
    assert engine.to_coco_results(rows) == [expected]
    assert all(isinstance(value, int | float | list) for value in engine.to_coco_results(rows)[0].values())


def test_nested_values_move_to_a_device():
    meta = torch.device("meta")
    moved = engine.move_to({"a": [torch.zeros(1), (torch.zeros(2),)], "b": "text"}, meta)
    assert moved["a"][0].device == moved["a"][1][0].device == meta and moved["b"] == "text"
