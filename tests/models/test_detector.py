"""Properties of the detectors: steps, batches, patterns, denoising queries, state-dict names."""

from argparse import Namespace

import pytest
import torch

from main import get_args_parser
from models import build_model
from models.denoising_queries import DenoisingSettings, add_noise, draw_noise, noised_queries, query_mask, slot_indices
from models.padding import resize_padding
from models.state import DenoisingQueries, DetectorState
from models.widths import Widths
from tests.pruning.tiny import tiny_args
from util.errors import UserError

TINY = (
    "--no-pretrained_backbone --backbone resnet18 --return_layer layer3 --enc_layers 2 --dec_layers 2 "
    "--hidden_dim 32 --nheads 4 --dim_feedforward 32 --num_queries 6 --scalar 2"
)

DEFORMABLE = "-m dn_dab_deformable_detr --num_feature_levels 4 --dec_n_points 2"
WIDTHS = [[[8, 16], [32, 32]], [[16, 32, 8], [32, 8, 32]]]
each_variant = pytest.mark.parametrize("options", ["", DEFORMABLE], ids=["dense", "deformable"])


def build(options: str = "", **changes):
    args = get_args_parser().parse_args(f"{TINY} {options}".split())
    torch.manual_seed(0)
    model, criterion, postprocessors = build_model(Namespace(**{**vars(args), "num_classes": 5, **changes}))
    # Heads start with zero offsets; without noise all boxes would be equal.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval(), criterion, postprocessors["bbox"]


def images_of(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def targets_of(*counts):
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
            "labels": torch.randint(0, 5, (count,), generator=generator),
        }
        for count in counts
    ]


def assert_same(found, expected, atol=1e-5):
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=atol)


@pytest.mark.parametrize("options", ["", "--num_patterns 3", "--transformer_activation relu", DEFORMABLE])
def test_steps_can_be_run_in_any_number_of_parts(options):
    model, _, _ = build(options)
    images = images_of((64, 96), (80, 64))
    with torch.no_grad():
        whole = model(images)
        for name in model.step_names:
            state = model.run_steps(model.prepare(images), stop=name)
            split = model.outputs(model.run_steps(state, start=name))
            assert_same(split, whole, atol=0)


@each_variant
def test_step_names_are_the_prunable_modules_in_order(options):
    model, _, _ = build(options)
    assert tuple(model.prunable_modules()) == model.step_names == model.widths.names()


@each_variant
def test_images_of_one_size_give_the_same_boxes_alone_and_in_a_batch(options):
    model, _, _ = build(options)
    images = images_of((64, 96), (64, 96), (64, 96))
    with torch.no_grad():
        batch = model(images)
        for index, image in enumerate(images):
            alone = model([image])
            assert_same(alone, {key: batch[key][index : index + 1] for key in ("pred_logits", "pred_boxes")}, 1e-4)


@each_variant
def test_a_tensor_of_images_equals_a_list_of_them(options):
    model, _, _ = build(options)
    images = images_of((64, 64), (64, 64))
    with torch.no_grad():
        assert_same(model(torch.stack(images)), model(images), atol=0)


def test_outputs_have_the_documented_shapes():
    model, _, _ = build("--num_patterns 3")
    outputs = model(images_of((64, 96), (80, 64)))
    assert outputs["pred_logits"].shape == (2, 18, 5)
    assert outputs["pred_boxes"].shape == (2, 18, 4)
    assert len(outputs["aux_outputs"]) == 1
    assert "denoising" not in outputs
    assert bool(((outputs["pred_boxes"] >= 0) & (outputs["pred_boxes"] <= 1)).all())


@each_variant
def test_matching_queries_do_not_see_denoising_ones(options):
    model, _, _ = build(options)
    images, targets = images_of((64, 96), (80, 64)), targets_of(3, 1)
    plain = model(model.pad(images))
    model.train()
    assert not any(m.training and isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert_same(model(images, targets), plain)


@each_variant
@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (3, 1)])
def test_training_works_with_and_without_targets(options, counts):
    """Every parameter gets a gradient; DistributedDataParallel would wait for a missing one."""
    model, criterion, _ = build(options)
    model.train()
    losses = criterion(model(images_of((64, 64), (64, 64)), targets_of(*counts)), targets_of(*counts))
    assert set(criterion.weight_dict) < set(losses)
    total = criterion.weighted_sum(losses)
    assert bool(torch.isfinite(total))
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    denoised = sum(float(losses[name].detach()) for name in losses if name.startswith("tgt_loss"))
    assert (denoised > 0) == (sum(counts) > 0)


def test_padding_slots_are_empty_and_real_slots_hold_their_target():
    targets = targets_of(3, 1)
    label_enc = torch.nn.Embedding(6, 7)
    noised = noised_queries(
        draw_noise(targets, 5, DenoisingSettings(groups=2, label_noise=0.0, box_noise=0.0)), label_enc
    )
    assert noised.layout == DenoisingQueries(num_queries=6, groups=2)
    for group in range(2):
        start = 3 * group
        assert noised.content[1, start + 1 : start + 3].abs().sum() == 0
        assert noised.anchor_logits[1, start + 1 : start + 3].abs().sum() == 0
        torch.testing.assert_close(noised.content[0, start : start + 3, :-1], label_enc(targets[0]["labels"]))
        torch.testing.assert_close(noised.anchor_logits[0, start : start + 3].sigmoid(), targets[0]["boxes"])
        assert bool((noised.content[0, start : start + 3, -1] == 1).all())


def test_noise_stays_in_its_bounds():
    torch.manual_seed(0)
    boxes = torch.rand(2000, 4) * 0.4 + 0.3
    labels = torch.full((2000,), 3)
    noised_labels, noised_boxes = add_noise(labels, boxes, 50, DenoisingSettings(1, 0.2, 0.4))
    reach = torch.cat((boxes[:, 2:] / 2, boxes[:, 2:]), 1) * 0.4
    assert bool(((noised_boxes - boxes).abs() <= reach + 1e-6).all())
    assert 0.15 < float((noised_labels != labels).float().mean()) < 0.25
    assert float(noised_boxes.min()) >= 0
    assert float(noised_boxes.max()) <= 1


def test_query_mask_keeps_groups_apart():
    mask = query_mask(DenoisingQueries(num_queries=4, groups=2), 3, torch.device("cpu"))
    expected = torch.tensor(
        [[1, 1, 0, 0, 1, 1, 1]] * 2 + [[0, 0, 1, 1, 1, 1, 1]] * 2 + [[0, 0, 0, 0, 1, 1, 1]] * 3, dtype=torch.bool
    )
    assert torch.equal(mask, expected)


def test_slots_run_group_by_group():
    image, slot, target = slot_indices(targets_of(2, 1), DenoisingQueries(num_queries=4, groups=2))
    assert image.tolist() == [0, 0, 1, 0, 0, 1]
    assert slot.tolist() == [0, 1, 0, 2, 3, 2]
    assert target.tolist() == [0, 1, 2, 0, 1, 2]


def test_the_next_layers_box_loss_reaches_the_layer_before():
    """The anchor that a box is relative to keeps its gradient; only the copy used in attention is detached."""
    model, _, _ = build()
    images = images_of((64, 64))
    state = model.run_steps(model.prepare(images), stop="decoder.1.self_attention")
    assert state.live_anchors.requires_grad
    assert not state.anchors.requires_grad


@each_variant
@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_anchor_eps_bounds_anchors_at_the_border(options, eps):
    """With zero box offsets, an anchor with sides near 0 is moved to the bound."""
    model, _, _ = build(f"{options} --anchor_eps {eps}")
    with torch.no_grad():
        model.refpoint_embed.weight.fill_(-20.0)
        for parameter in model.bbox_embed.parameters():
            parameter.zero_()
        boxes = model(images_of((96, 96)))["pred_boxes"]
    torch.testing.assert_close(boxes, torch.full_like(boxes, eps / (1 + eps)), rtol=1e-3, atol=0)


def test_detectors_with_widths_use_the_names_of_slim_models():
    widths = Widths.parse("[[[8,16],[32,4]],[[4,8,32],[32,32,8]]]")
    model, _, _ = build(cfgs=widths)
    keys = model.state_dict()
    assert keys["transformer.encoder.layers.0.in_proj_weight"].shape == (24, 32)
    assert not any("encoder.layers.0.self_attn" in key for key in keys)
    assert {name: module.width for name, module in model.prunable_modules().items()} == dict(widths.items())


@each_variant
@pytest.mark.parametrize(
    "cfgs",
    [WIDTHS, [str(WIDTHS)], str(WIDTHS), ((((8, 16), (32, 32)), ((16, 32, 8), (32, 8, 32)))), Widths.parse(WIDTHS)],
    ids=["lists", "words", "text", "tuples", "widths"],
)
def test_widths_may_be_lists_text_or_parsed(options, cfgs):
    model, _, _ = build(options, cfgs=cfgs)
    assert model.widths == Widths.parse(WIDTHS)
    assert model.transformer.encoder.layers[0].linear1.out_features == 16
    with torch.no_grad():
        assert model(images_of((96, 96)))["pred_boxes"].shape == (1, 6, 4)


@each_variant
@pytest.mark.parametrize(
    ("cfgs", "message"),
    [
        ([[[8, 16]], [[16, 32, 8], [32, 8, 32]]], "found 1 encoder layers, expected 2"),
        ([[[6, 16], [32, 32]], WIDTHS[1]], "width 6 for encoder.0.attention, expected a multiple"),
        ([[[8.0, 16], [32, 32]], WIDTHS[1]], "expected whole numbers"),
        ([], "--cfgs: found"),
        (5, "--cfgs: expected two or three lists"),
        ({}, "--cfgs: expected two or three lists"),
    ],
)
def test_widths_that_do_not_fit_are_a_user_error(options, cfgs, message):
    with pytest.raises(UserError, match=message):
        build(options, cfgs=cfgs)


def test_dilation_keeps_stride_16_for_basic_and_bottleneck_blocks():
    for backbone in ("resnet18", "resnet50"):
        model, _, _ = build(f"--return_layer layer4 --dilation --backbone {backbone}")
        (features,) = model.backbone[0](torch.zeros(1, 3, 64, 96), ["layer4"])
        assert features.shape[-2:] == (4, 6)


def test_trainable_batch_norm_trains_the_whole_backbone():
    frozen = [p.requires_grad for p in build()[0].backbone.parameters()]
    trained = [p.requires_grad for p in build("--batch_norm_type BatchNorm2d")[0].backbone.parameters()]
    assert not all(frozen)
    assert any(frozen)
    assert all(trained)


def test_a_state_maps_its_tensors():
    memory = torch.zeros(2, 3, 4)
    state = DetectorState(memory, memory, None, memory + 1, None, memory[..., :1], memory, hidden=(memory + 2,))
    doubled = state.map(lambda tensor: tensor * 2)
    assert float(doubled.hidden[0].mean()) == 4
    assert doubled.memory_mask is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--hidden_dim 48", "--hidden_dim: found 48, expected a multiple of 32"),
        ("--num_patterns 2", "--num_patterns: found 2"),
        ("--num_feature_levels 1", "--num_feature_levels: found 1, expected at least 2"),
    ],
)
def test_options_that_the_deformable_variant_lacks_are_a_user_error(options, message):
    with pytest.raises(UserError, match=message):
        build(f"{DEFORMABLE} {options}")


def test_the_decoder_starts_on_a_ring_of_points_with_equal_weights():
    args = get_args_parser().parse_args(f"{TINY} {DEFORMABLE}".split())
    model, _, _ = build_model(Namespace(**{**vars(args), "num_classes": 5}))
    attention = model.transformer.decoder.layers[0].cross_attn
    offsets = attention.sampling_offsets.bias.view(4, 4, 2, 2)
    assert offsets.detach()[:, 0, 1].round().tolist() == [[2, 0], [0, 2], [-2, 0], [0, -2]]
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    assert float(model.bbox_embed[0].layers[-1].bias[2]) == -2
    assert float(model.bbox_embed[1].layers[-1].bias[2]) == 0


def test_padding_is_resized_to_the_nearest_as_pytorch_does():
    for height, width, stride in ((130, 97, 32), (800, 1333, 32), (61, 200, 16)):
        padding = torch.rand(2, height, width) < 0.5
        size = (-(-height // stride), -(-width // stride))
        expected = torch.nn.functional.interpolate(padding[None].float(), size=size)[0].bool()
        assert torch.equal(resize_padding(padding, size), expected)


@pytest.mark.parametrize("num_classes", [None, 0, -4, "x", True])
def test_a_detector_is_built_for_a_number_of_classes(num_classes):
    args = tiny_args()
    args.num_classes = num_classes
    if num_classes is None:
        del args.num_classes
    with pytest.raises(UserError, match=r"num_classes: found .*, expected the largest category id"):
        build_model(args)
