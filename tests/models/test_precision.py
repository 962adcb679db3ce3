"""Detectors in float64, and what stays in float32 under autocast."""

import pytest
import torch

from models.dn_dab_deformable_detr import attention
from models.dn_dab_deformable_detr.ops import sampling
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector


@pytest.fixture(autouse=True)
def _in_pytorch(monkeypatch):
    """The pure form of the sampling, whether the operator is installed or not; both check the types of arguments."""
    monkeypatch.setattr(sampling, "_compiled_for", frozenset())


def outcome(variant, *, dtype, training):
    """Outputs and gradients of the weighted loss, computed in `dtype`."""
    model, criterion, postprocessors = tiny_detector(VARIANTS[variant])
    model.to(dtype).train(training)
    images, targets = pictures()
    images = [image.to(dtype) for image in images]
    for target in targets:  # as from the data loader: float32
        assert target["boxes"].dtype == torch.float32
    torch.manual_seed(0)
    outputs = model(images, targets if training else None)
    loss = criterion.weighted_sum(criterion(outputs, targets))
    loss.backward()
    detections = postprocessors["bbox"](outputs, torch.tensor([[64, 64], [64, 96]]))
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    found = (outputs["pred_logits"], outputs["pred_boxes"], loss, detections[0]["boxes"], torch.cat(gradients))
    return [tensor.detach() for tensor in found]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_detector_runs_in_float64(variant, training):
    """Outputs, loss, detections and gradients are float64, and near those in float32."""
    found = outcome(variant, dtype=torch.float64, training=training)
    assert {tensor.dtype for tensor in found} == {torch.float64}
    expected = outcome(variant, dtype=torch.float32, training=training)
    assert {tensor.dtype for tensor in expected} == {torch.float32}
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_float64_are_those_of_finite_differences(variant):
    """The steps are so small that a single rounding to float32 would hide them."""
    model, _, _ = tiny_detector(f"{VARIANTS[variant]} --dec_layers 1")
    model.double().eval()
    images = [image.double() for image in pictures()[0]]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def number():
        outputs = model(images)
        return outputs["pred_logits"].square().mean() + outputs["pred_boxes"].square().mean()

    gradients = torch.autograd.grad(number(), parameters, allow_unused=True)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    step, values = 1e-8, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=sign * step)
            values.append(number())
    assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(float(slope), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_sampling_points_in_float32(dtype, monkeypatch):
    """Values are in 16 bits, their places and weights are not: 16 bits are too few for the pixels of a large map."""
    seen = []

    def record(value, level_sizes, locations, weights):
        seen.append((value.dtype, locations.dtype, weights.dtype))
        return sampling.sample(value, level_sizes, locations, weights)

    monkeypatch.setattr(attention, "sample", record)
    model, _, _ = tiny_detector(VARIANTS["deformable"])
    with torch.autocast("cpu", dtype), torch.no_grad():
        model.eval()(pictures()[0])
    assert set(seen) == {(dtype, torch.float32, torch.float32)}
    assert len(seen) == 3  # one encoder layer, two decoder layers
