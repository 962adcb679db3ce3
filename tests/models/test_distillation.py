"""Distillation losses: zero if both detectors agree, and weighted by the teacher's confidence."""

import copy
from dataclasses import replace

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d

from models.backbone import FROZEN_STAGES
from models.denoising_queries import DenoisingSettings
from models.distillation import QUERIES, Distillation, Lesson
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector

WEIGHTS = {"loss_distill_logits": 1.0, "loss_distill_bbox": 5.0, "loss_distill_giou": 2.0, "loss_distill_memory": 3.0}
NAMES = {f"{name}{end}" for name in list(WEIGHTS)[:3] for end in ("", "_0")} | {"loss_distill_memory"}

each_variant = pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)


def distillation(network: str = "") -> Distillation:
    """A tiny teacher of two decoder layers, five queries and seven classes."""
    return Distillation(tiny_detector(network)[0], WEIGHTS)


def example(seed: int = 0) -> tuple[dict, Lesson]:
    """Random outputs of a student and a teacher: 2 layers, 2 images, 5 queries, 3 classes, 4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits, taught = torch.randn(2, 2, 2, 5, 3, generator=generator)
    boxes, taught_boxes = torch.rand(2, 2, 2, 5, 4, generator=generator) * 0.3 + 0.3
    memory, taught_memory = torch.randn(2, 2, 4, 8, generator=generator)
    layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
    outputs = {**layers[1], "aux_outputs": layers[:1], "memory": memory}
    return outputs, Lesson(taught.sigmoid(), taught_boxes, taught_memory, torch.ones(2, 4))


@each_variant
def test_a_student_equal_to_its_teacher_has_zero_loss(network):
    teaching = distillation(network)
    student = copy.deepcopy(teaching.teacher).requires_grad_(True).train()
    images, targets = pictures()
    losses = teaching(student(images, targets), teaching.teach(images))
    assert set(losses) == NAMES
    assert all(float(value.detach()) == pytest.approx(0, abs=1e-5) for value in losses.values())


@each_variant
def test_teacher_and_student_see_the_same_padded_images(network):
    """Sizes that are no multiple of a stride; the student pads images, as it is in training."""
    teaching = distillation(network)
    student = copy.deepcopy(teaching.teacher).requires_grad_(True).train()
    images, targets = pictures(((40, 70), (65, 33), (97, 64)))
    outputs, lesson = student(images, targets), teaching.teach(images)
    torch.testing.assert_close(outputs["memory"], lesson.memory, atol=1e-4, rtol=0)
    assert all(float(value.detach()) == pytest.approx(0, abs=1e-5) for value in teaching(outputs, lesson).values())
    assert 0 < float(lesson.pixels.mean()) < 1


@pytest.mark.filterwarnings("ignore:no compiled sampling")
@each_variant
def test_a_teacher_with_converted_weights_gives_the_same_bits(network, monkeypatch):
    teaching = Distillation(tiny_detector(network)[0], WEIGHTS, kinds=("matching", "anchors"))
    images, targets = pictures()
    queries = teaching.draw(targets)
    found = []
    for runner in (teaching._runner, lambda: teaching.teacher):
        monkeypatch.setattr(teaching, "_runner", runner)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(teaching.teach(images, queries))
    assert {p.dtype for p in teaching.teacher.parameters()} == {torch.float32} and len(teaching._converted) == 1
    one, other = ((lesson.probabilities, lesson.memory, *lesson.extra["anchors"]) for lesson in found)
    assert all(map(torch.equal, one, other))


@each_variant
def test_gradients_reach_every_part_of_the_student_and_none_of_the_teacher(network):
    teaching = distillation(network)
    before = {key: value.clone() for key, value in teaching.teacher.state_dict().items()}
    student = tiny_detector(network, seed=1)[0].train()
    images, targets = pictures()
    losses = teaching(student(images, targets), teaching.teach(images))
    assert all(float(value.detach()) > 1e-4 for value in losses.values())
    assert float(teaching.weighted_sum(losses).detach()) == pytest.approx(
        sum(float(value.detach()) * WEIGHTS[name.removesuffix("_0")] for name, value in losses.items()), rel=1e-5
    )
    for name, value in losses.items():
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients), name
    assert not teaching.teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teaching.teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teaching.teacher.state_dict().items())


def test_the_losses_are_those_of_the_equations():
    outputs, lesson = example()
    losses = distillation()(outputs, lesson)
    for layer, (end, found) in enumerate((("_0", outputs["aux_outputs"][0]), ("", outputs))):
        taught, boxes = lesson.probabilities[layer], lesson.boxes_cxcywh[layer]
        weights = taught.max(dim=-1).values ** 2
        p = found["pred_logits"].sigmoid()
        focal = (taught - p) ** 2 * -(taught * p.log() + (1 - taught) * (1 - p).log())
        distance = (found["pred_boxes"] - boxes).abs().sum(-1)
        torch.testing.assert_close(losses[f"loss_distill_logits{end}"], focal.sum() / weights.sum())
        torch.testing.assert_close(losses[f"loss_distill_bbox{end}"], (weights * distance).sum() / weights.sum())


def test_background_queries_of_the_teacher_do_not_affect_boxes():
    outputs, lesson = example()
    lesson.probabilities[:, :, 1:] = 1e-4
    lesson.probabilities[:, :, 0] = 0.9
    before = distillation()(outputs, lesson)
    lesson.boxes_cxcywh[:, :, 1:] = 0.1
    after = distillation()(outputs, lesson)
    for name in ("loss_distill_bbox", "loss_distill_giou_0"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("background", [0, 299])
def test_one_object_outweighs_many_background_queries(background):
    probabilities = torch.full((1, 1, 1 + background, 3), 0.03)
    probabilities[0, 0, 0, 0] = 0.9
    logits, boxes = torch.full((1, 1 + background, 3), -4.0), torch.full((1, 1 + background, 4), 0.4)
    outputs = {"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": [], "memory": torch.zeros(1, 4, 8)}
    teaching = Distillation(tiny_detector("--dec_layers 1")[0], WEIGHTS)
    losses = teaching(outputs, Lesson(probabilities, boxes[None], torch.zeros(1, 4, 8), torch.ones(1, 4)))
    p = torch.tensor(-4.0).sigmoid()
    object_alone = (0.9 - p) ** 2 * -(0.9 * p.log() + 0.1 * (1 - p).log())
    # The squared confidences sum to 0.81 with or without the background, up to 0.03 ** 2 a query, but at least to 1.
    assert float(losses["loss_distill_logits"]) == pytest.approx(float(object_alone), rel=0.1)


def test_memory_is_compared_by_direction_on_image_pixels_alone():
    outputs, lesson = example()
    scaled = {**outputs, "memory": 3 * lesson.memory + 2}
    assert float(distillation()(scaled, lesson)["loss_distill_memory"]) == pytest.approx(0, abs=1e-6)
    padded = Lesson(lesson.probabilities, lesson.boxes_cxcywh, lesson.memory, torch.tensor([[1.0, 1, 0, 0]] * 2))
    before = float(distillation()(outputs, padded)["loss_distill_memory"])
    outputs["memory"][:, 2:] = 100 * torch.randn(2, 2, 8)
    assert float(distillation()(outputs, padded)["loss_distill_memory"]) == before
    cropped = Lesson(lesson.probabilities, lesson.boxes_cxcywh, lesson.memory[:, :2], torch.ones(2, 2))
    whole = distillation()({**outputs, "memory": outputs["memory"][:, :2]}, cropped)
    assert float(whole["loss_distill_memory"]) == pytest.approx(before)


@each_variant
def test_the_padding_mask_of_the_batch_is_used(network):
    lesson = distillation(network).teach(pictures(((64, 64), (64, 96)))[0])
    assert lesson.pixels.shape == lesson.memory.shape[:2]
    assert lesson.pixels[1].all()
    assert float(lesson.pixels[0].mean()) == pytest.approx(2 / 3)


@each_variant
def test_images_of_one_size_have_no_padding(network):
    lesson = distillation(network).teach(pictures(((64, 64), (64, 64)))[0])
    assert lesson.pixels.shape == lesson.memory.shape[:2]
    assert lesson.pixels.all()


def test_a_teacher_without_detections_gives_finite_losses():
    outputs, lesson = example()
    lesson.probabilities.zero_()
    losses = distillation()(outputs, lesson)
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert float(losses["loss_distill_bbox"]) == 0


@each_variant
def test_a_student_of_fewer_layers_learns_its_last_from_the_teachers_last(network):
    teacher = tiny_detector(f"{network} --dec_layers 3")[0]
    teaching = Distillation(teacher, WEIGHTS, num_layers=2)
    images, targets = pictures()
    lesson = teaching.teach(images)
    with torch.no_grad():
        outputs = teacher(teacher.pad(images))
    layers = [*outputs["aux_outputs"], outputs]
    torch.testing.assert_close(lesson.probabilities, torch.stack([layers[i]["pred_logits"].sigmoid() for i in (0, 2)]))
    torch.testing.assert_close(lesson.boxes_cxcywh, torch.stack([layers[i]["pred_boxes"] for i in (0, 2)]))
    student = tiny_detector(network)[0].train()
    assert set(teaching(student(images, targets), lesson)) == NAMES == set(teaching.weight_dict)
    assert teaching.remark is not None and Distillation(teacher, WEIGHTS).remark is None


@pytest.mark.parametrize("kinds", [("denoising",), ("anchors",), ("targets",), ("targets", "matching", "anchors")])
@each_variant
def test_a_teacher_of_the_same_weights_gives_zero_loss_for_every_kind_of_query(network, kinds):
    teacher = tiny_detector(network)[0]
    noise = DenoisingSettings(groups=2, label_noise=0.5, box_noise=0.4)
    teaching = Distillation(teacher, WEIGHTS, kinds=kinds, noise=noise)
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    images, targets = pictures(((64, 64), (64, 96)))
    queries = teaching.draw(targets)
    losses = teaching(student(images, queries), teaching.teach(images, queries))
    assert set(losses) == set(teaching.weight_dict)
    assert all(float(value.detach()) == pytest.approx(0, abs=1e-5) for value in losses.values())
    other = tiny_detector(network, seed=1)[0].train()
    losses = teaching(other(images, queries), teaching.teach(images, queries))
    assert all(float(value.detach()) > 1e-4 for value in losses.values())


@each_variant
def test_anchors_for_the_teacher_change_no_other_output(network):
    student = tiny_detector(network)[0].train()
    images, targets = pictures(((64, 64), (64, 96)))
    every = Distillation(student, WEIGHTS, kinds=tuple(QUERIES), noise=DenoisingSettings(2)).draw(targets)
    student.train()
    with torch.no_grad():
        with_anchors, without = student(images, every), student(images, replace(every, anchors_cxcywh={}))
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(with_anchors[name], without[name])
        torch.testing.assert_close(with_anchors["denoising"][name], without["denoising"][name])
    assert [len(anchors["pred_boxes"]) for anchors in with_anchors["anchors"]] == [2, 2] and "anchors" not in without


def test_a_batch_without_targets_has_all_losses():
    teacher = tiny_detector("")[0]
    teaching = Distillation(teacher, WEIGHTS, kinds=tuple(QUERIES), noise=DenoisingSettings(2))
    images, targets = pictures(((64, 64), (64, 96)))
    nothing = [{**target, "labels": target["labels"][:0], "boxes": target["boxes"][:0]} for target in targets]
    queries = teaching.draw(nothing)
    losses = teaching(tiny_detector("", seed=1)[0].train()(images, queries), teaching.teach(images, queries))
    assert set(losses) == set(teaching.weight_dict) and float(losses["loss_distill_denoising_logits"]) == 0
    assert all(bool(torch.isfinite(value)) for value in losses.values())


@each_variant
@pytest.mark.parametrize("frozen", [False, True])
def test_shared_layers_run_once_and_change_nothing(network, frozen):
    """Losses and gradients are those of two separate forward passes; images of several sizes are padded alike."""
    teaching = distillation(network)
    student = copy.deepcopy(teaching.teacher).requires_grad_(True).train()
    backbone = student.backbone[0]
    backbone.frozen = frozen
    for name, layer in backbone.body.items():
        layer.requires_grad_(not frozen and name not in FROZEN_STAGES)
    student.train()
    with torch.no_grad():
        student.transformer.encoder.layers[0].linear1.weight.mul_(1.1)
    sharing = Distillation(teaching.teacher, WEIGHTS, student=student)
    assert sharing.shared_layers == (len(backbone.body) if frozen else [*backbone.body].index("layer1") + 1)
    images, _ = pictures(((40, 70), (65, 33), (97, 64)))
    calls = []
    stem = [module.body["conv1"] for module in (backbone, teaching.teacher.backbone[0])]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in stem]
    found = []
    for inputs in (images, sharing.begin(images)):
        student.zero_grad()
        losses = sharing(student(inputs), sharing.teach(inputs))
        sharing.weighted_sum(losses).backward()
        found.append([losses, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}])
    assert len(calls) == 2 + 1
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(*found)
    assert any(name.startswith("backbone") for name in found[1][1]) == (not frozen)


def test_only_layers_that_cannot_differ_are_shared():
    teacher, changed = tiny_detector()[0], tiny_detector()[0]
    backbone = changed.backbone[0]
    first_stage = [*backbone.body].index("layer1")
    assert Distillation(teacher, WEIGHTS, student=changed).shared_layers == first_stage + 1
    next(module for module in backbone.body["layer1"].modules() if isinstance(module, FrozenBatchNorm2d)).bias += 1
    assert Distillation(teacher, WEIGHTS, student=changed).shared_layers == first_stage
    backbone.body["maxpool"].padding = 0
    assert Distillation(teacher, WEIGHTS, student=changed).shared_layers == first_stage - 1
    trainable = tiny_detector("--batch_norm_type BatchNorm2d")[0]
    assert Distillation(copy.deepcopy(trainable), WEIGHTS, student=trainable).shared_layers == 0
    trainable.backbone[0].requires_grad_(False)  # the statistics still change
    assert Distillation(copy.deepcopy(trainable), WEIGHTS, student=trainable).shared_layers == 1
    reference = tiny_detector()[0]
    reference.padding_rule = "reference"
    assert Distillation(teacher, WEIGHTS, student=reference).shared_layers == 0
    images, _ = pictures()
    assert Distillation(teacher, WEIGHTS, student=reference).begin(images) is images


@pytest.mark.parametrize("confidence", [0.05, 0.9])
def test_two_processes_have_the_mean_gradient_of_one(confidence, monkeypatch):
    """Also where the confidences of all queries sum to less than 1."""
    outputs, lesson = example()
    lesson = replace(lesson, probabilities=lesson.probabilities * confidence)
    whole = distillation()(outputs, lesson)
    parts = []
    for image in ([0], [1]):
        layers = [{"pred_logits": a["pred_logits"][image], "pred_boxes": a["pred_boxes"][image]}
                  for a in (outputs["aux_outputs"][0], outputs)]  # fmt: skip
        found = {**layers[1], "aux_outputs": layers[:1], "memory": outputs["memory"][image]}
        taught = replace(lesson, probabilities=lesson.probabilities[:, image], memory=lesson.memory[image],
                         boxes_cxcywh=lesson.boxes_cxcywh[:, image], pixels=lesson.pixels[image])  # fmt: skip
        parts.append((found, taught))
    given = []
    monkeypatch.setattr("util.distributed.average", lambda values: given.append(values) or values)
    for part in parts:
        distillation()(*part)
    means = {name: (given[0][name] + given[1][name]) / 2 for name in given[0]}
    monkeypatch.setattr("util.distributed.average", lambda values: means)
    monkeypatch.setattr("util.distributed.world_size", lambda: 2)
    losses = [distillation()(*part) for part in parts]
    for name, value in whole.items():
        torch.testing.assert_close((losses[0][name] + losses[1][name]) / 2, value)
