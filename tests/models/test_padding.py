"""Images of different sizes in one batch give the same outputs as alone; training pads to the same geometry."""

import random

import pytest
import torch

from models.padding import PADDING_RULES, PaddedImages, group_by_size, join_maps, pad_images, padding_of_map
from tests.models.test_detector import DEFORMABLE, assert_same, build, images_of, targets_of

NETWORKS = {
    "dense": "",
    "dense, stride 32": "--return_layer layer4",
    "dense, dilated": "--return_layer layer4 --dilation",
    "deformable": f"{DEFORMABLE} --hidden_dim 64",
    "deformable, two levels": f"{DEFORMABLE} --hidden_dim 64 --num_feature_levels 2",
    "deformable, levels to stride 256": f"{DEFORMABLE} --hidden_dim 64 --return_layer layer4 --num_feature_levels 6",
}
each_network = pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
# One pixel, around multiples of the strides, and one huge image among small ones.
SIDES = (1, 16, 17, 31, 32, 33, 63, 64, 65, 90, 97, 130)
FIXED = [
    ((64, 96), (80, 64)),
    ((300, 410), (16, 16), (40, 33)),
    ((1, 1), (33, 1), (1, 65)),
    ((96, 80),) * 2 + ((96, 81),),
]


def compositions(count=4):
    """Sizes of the images of a batch: some chosen ones, then random ones."""
    generator = random.Random(0)
    drawn = [
        tuple((generator.choice(SIDES), generator.choice(SIDES)) for _ in range(generator.randint(2, 5)))
        for _ in range(count)
    ]
    return FIXED + drawn


def ceil_padding(size_hw, map_hw, stride):
    """Padding of a map that an image of that size has ceil(side / stride) rows and columns of."""
    rows, columns = (-(-side // stride) for side in size_hw)
    padding = torch.ones(map_hw, dtype=torch.bool)
    padding[:rows, :columns] = False
    return padding


@each_network
@torch.no_grad()
def test_an_image_has_the_same_outputs_alone_and_in_any_batch(options):
    model, _, _ = build(options)
    for sizes in compositions():
        images = images_of(*sizes)
        together = model(images)
        for index, image in enumerate(images):
            alone = {key: together[key][index : index + 1] for key in ("pred_logits", "pred_boxes")}
            assert_same(model([image]), alone, atol=1e-5)


@each_network
@torch.no_grad()
def test_valid_rows_and_columns_are_those_of_the_image_alone_in_evaluation_and_in_training(options):
    model, _, _ = build(options)
    for sizes in compositions():
        images = images_of(*sizes)
        for features in (model.features(images), model.train().features(images)):
            assert features.is_padded
            for padding, stride in zip(features.paddings, model.strides, strict=True):
                expected = torch.stack([ceil_padding(size, padding.shape[1:], stride) for size in sizes])
                assert torch.equal(padding, expected)
        model.eval()
        for image, size in zip(images, sizes, strict=True):
            alone = model.features([image])
            assert [padding.shape[1:] for padding in alone.paddings] == [
                tuple(-(-side // stride) for side in size) for stride in model.strides
            ]
            assert not alone.is_padded and not any(padding.any() for padding in alone.paddings)


@each_network
def test_training_pads_images_to_a_multiple_of_the_backbones_stride_and_evaluation_does_not(options, monkeypatch):
    model, _, _ = build(f"{options} --batch_norm_type BatchNorm2d")
    stride = {"layer3": 16, "layer4": 32}[model.stages[-1]]
    stride = 16 if "--dilation" in options else stride
    seen = []
    model.backbone[0].register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    images = images_of((40, 70), (65, 33), (40, 70))
    model.train()(images, targets_of(1, 2, 0))
    sides = [-(-side // stride) * stride for side in (65, 70)]
    assert seen == [(3, 3, *sides)]  # batch norm sees the whole batch at once
    seen.clear()
    with torch.no_grad():
        model.eval()(images)
    assert seen == [(2, 3, 40, 70), (1, 3, 65, 33)]


@each_network
@torch.no_grad()
def test_callers_may_pad_by_any_number_of_pixels(options):
    """Only the mask marks valid pixels, as in an exported graph; the convolutions see the padding."""
    model, _, _ = build(options)
    for more in (0, 1, 37):
        batch = torch.zeros(1, 3, 97 + more, 64 + more)
        batch[..., :97, :64] = images_of((97, 64))[0]
        mask = torch.ones(1, *batch.shape[2:], dtype=torch.bool)
        mask[:, :97, :64] = False
        features = model.features(PaddedImages(batch, mask))
        for padding, stride in zip(features.paddings, model.strides, strict=True):
            assert torch.equal(padding[0], ceil_padding((97, 64), padding.shape[1:], stride))
        if not more:
            assert_same(model(PaddedImages(batch, mask)), model(images_of((97, 64))))


@each_network
@pytest.mark.parametrize("training", [False, True])
def test_images_of_one_size_give_the_same_under_either_rule(options, training):
    """97 x 70 pixels are no multiple of any stride, and are not padded to one."""
    images, targets = images_of((97, 70), (97, 70)), targets_of(2, 1)
    outputs = []
    for rule in PADDING_RULES:
        model, _, _ = build(f"{options} --padding_rule {rule} --label_noise_scale 0 --box_noise_scale 0")
        outputs.append(model.train(training)(images, targets if training else None))
        assert not model.features(images).is_padded
    assert_same(*outputs, atol=0)


@each_network
@torch.no_grad()
def test_under_the_references_rule_an_image_depends_on_the_batch(options):
    model, _, _ = build(f"{options} --padding_rule reference")
    images = images_of((80, 64), (97, 130))
    alone, together = model(images[:1]), model(images)
    assert float((alone["pred_boxes"] - together["pred_boxes"][:1]).abs().max()) > 1e-3
    assert model.pad(images).batch.shape[-2:] == (97, 130)


@torch.no_grad()
def test_the_references_rule_marks_a_padding_row_as_valid():
    """64 of 80 pixels at stride 32: three rows, the last of which begins at pixel 53 by nearest, at 64 in truth."""
    rows = {}
    for rule in PADDING_RULES:
        model, _, _ = build(f"--return_layer layer4 --padding_rule {rule}")
        (padding,) = model.features(images_of((64, 64), (80, 64))).paddings
        rows[rule] = (~padding[:, :, 0]).sum(1).tolist()
    assert rows == {"exact": [2, 3], "reference": [3, 3]}


@torch.no_grad()
def test_a_level_of_one_pixel_may_have_one_channel_a_group():
    """32 channels in 32 groups: nn.GroupNorm refuses a single value in a group."""
    model, _, _ = build(DEFORMABLE)
    images = images_of((16, 16), (60, 40))
    together = model(images)
    assert model.features(images[:1]).paddings[-1].shape == (1, 1, 1)
    assert_same(model(images[:1]), {key: together[key][:1] for key in ("pred_logits", "pred_boxes")})
    torch.testing.assert_close(model.features(images[:1]).memory[0, -1], model.input_proj[-1][1].bias)
    norm, plain = model.input_proj[0][1], torch.nn.GroupNorm(32, 32)
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(features := torch.randn(2, 32, 3, 5)), plain(features))


@pytest.mark.parametrize("options", [NETWORKS["dense"], NETWORKS["deformable"]], ids=["dense", "deformable"])
@torch.no_grad()
def test_mixed_precision_keeps_its_type_and_agrees_with_images_alone(options):
    model, _, _ = build(options)
    images = images_of((64, 96), (80, 64), (80, 64))
    with torch.autocast("cpu", torch.bfloat16):
        together = model.features(images)
        alone = [model.features([image]) for image in images]
    assert together.memory.dtype == alone[0].memory.dtype
    for index, features in enumerate(alone):
        valid = torch.cat([~padding[index].flatten() for padding in together.paddings])
        torch.testing.assert_close(
            together.memory[index][valid].float(), features.memory[0].float(), rtol=0.02, atol=0.05
        )
        assert not together.memory[index][~valid].any()


def test_gradients_reach_the_backbone_through_joined_maps():
    model, _, _ = build("")
    images = images_of((64, 96), (80, 64))
    gradients = []
    for batches in ([images], [[image] for image in images]):
        model.zero_grad()
        sum(model(batch)["pred_boxes"].sum() for batch in batches).backward()
        gradients.append(model.backbone[0].body["layer3"][1].conv2.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    assert gradients[0].abs().max() > 0


def test_padding_images_fills_in_zeros_and_rounds_up():
    images = images_of((5, 9), (7, 4))
    for multiple, size in ((1, (7, 9)), (4, (8, 12)), (7, (7, 14))):
        batch, padding, _ = pad_images(images, multiple)
        assert batch.shape == (2, 3, *size) and padding.shape == (2, *size)
        for canvas, mask, image in zip(batch, padding, images, strict=True):
            height, width = image.shape[1:]
            assert torch.equal(canvas[:, :height, :width], image)
            assert int((~mask).sum()) == height * width and not mask[:height, :width].any()
            assert not canvas[:, mask].any()
    assert pad_images(images[:1] * 2, 4).padding is None


def test_groups_are_joined_in_the_images_order():
    images = images_of((4, 6), (5, 3), (4, 6))
    groups = group_by_size(images)
    assert [group.places for group in groups] == [[0, 2], [1]]
    joined, padding = join_maps(groups, [group.batch for group in groups])
    expected = pad_images(images)
    assert torch.equal(joined, expected.batch) and torch.equal(padding, expected.padding)


@pytest.mark.parametrize("stride", [4, 8, 16, 32, 64])
def test_the_padding_of_a_map_counts_the_rows_that_begin_on_the_image(stride):
    for whole in range(1, 140, 7):
        small = -(-whole // stride)
        for side in range(1, whole + 1):
            padding = torch.ones(1, whole, whole, dtype=torch.bool)
            padding[:, :side, :] = False
            found = padding_of_map(padding, (small, small), stride)
            assert int((~found[0, :, 0]).sum()) == -(-side // stride)
