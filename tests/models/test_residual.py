"""The backbone's residual blocks: torchvision's function, its names and its initial values, at any width."""

import pytest
import torch
import torchvision

from models.backbone import NORM_LAYERS, Backbone
from models.residual import BLOCK, ResidualBlock, block_widths
from tests.pruning.tiny import randomise_norms
from util.errors import UserError

BACKBONES = ("resnet18", "resnet50")
SLIM = {"resnet18": ((5, 64), (128, 1), (256, 256)), "resnet50": ((5, 64, 64), (128, 1, 128, 7), (256,) * 5 + (9,))}
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
each_backbone = pytest.mark.parametrize("name", BACKBONES)
each_norm = pytest.mark.parametrize("norm", NORM_LAYERS)


def build(name, norm="FrozenBatchNorm2d", widths=None, return_layer="layer3", dilation=False):
    torch.manual_seed(0)
    return Backbone(name, return_layer, dilation, norm, pretrained=False, widths=widths)


def build_torchvisions(name, norm):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, norm_layer=NORM_LAYERS[norm])


@each_backbone
@each_norm
@pytest.mark.parametrize("training", [False, True])
def test_a_whole_backbone_is_torchvisions_to_the_last_bit(name, norm, training):
    ours, theirs = build(name, norm).train(training), build_torchvisions(name, norm).train(training)
    state = theirs.state_dict()
    assert list(ours.body.state_dict()) == [key for key in state if not key.startswith(("layer4", "fc"))]
    assert all(torch.equal(value, state[key]) for key, value in ours.body.state_dict().items())
    assert [n for n, _ in ours.body.named_parameters()] == [
        n for n, _ in theirs.named_parameters() if not n.startswith(("layer4", "fc"))
    ]
    randomise_norms(theirs)
    ours.body.load_state_dict({key: theirs.state_dict()[key] for key in ours.body.state_dict()})
    found = ours(IMAGES, ["layer2", "layer3"])
    expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(IMAGES))))
    expected = theirs.layer2(theirs.layer1(expected))
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], theirs.layer3(expected))


def test_a_dilated_backbone_is_torchvisions():
    ours = build("resnet50", return_layer="layer4", dilation=True)
    theirs = torchvision.models.resnet50(
        norm_layer=NORM_LAYERS["FrozenBatchNorm2d"], replace_stride_with_dilation=[False, False, True]
    )
    theirs.load_state_dict(ours.body.state_dict(), strict=False)
    x = torch.randn(1, 1024, 4, 6)
    assert torch.equal(ours.body["layer4"](x), theirs.layer4(x))


@each_backbone
@each_norm
def test_a_slim_backbone_is_built_slim(name, norm):
    backbone = build(name, norm, SLIM[name])
    assert backbone.widths == SLIM[name]
    block = backbone.residual_blocks()["layer1.0"]
    assert block.conv1.weight.shape[0] == len(block.bn1.running_mean) == block.conv2.weight.shape[1] == 5
    assert backbone(IMAGES, ["layer3"])[0].shape == (2, 1024 if name == "resnet50" else 256, 4, 6)
    whole = build(name, norm)
    untouched = {n: b for n, b in whole.residual_blocks().items() if b.width == backbone.residual_blocks()[n].width}
    assert 0 < len(untouched) < len(whole.residual_blocks())
    assert 0.5 < block.conv1.weight.std() / whole.residual_blocks()["layer1.0"].conv1.weight.std() * (5 / 64) ** 0.5 < 2


@each_backbone
def test_the_widths_of_whole_blocks(name):
    assert block_widths(name, "layer3") == build(name).widths
    assert len(block_widths(name, "layer4")) == 4


@each_backbone
def test_the_input_of_a_convolution_is_the_one_that_it_gets(name):
    block = build(name).residual_blocks()["layer2.0"]
    gates = [torch.rand(block.width) for _ in block.parts]
    block.gates[BLOCK] = (*gates, None)[:2]
    given, x = [], torch.randn(2, block.conv1.in_channels, 8, 8)
    for convolution, _ in block.convolutions():
        convolution.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    block(x)
    assert len(given) == len(block.parts) + 1
    for number, expected in enumerate(list(given), 1):
        assert torch.equal(block.input_of(number, x), expected)


@each_backbone
def test_each_image_may_have_its_own_gate(name):
    block: ResidualBlock = build(name).residual_blocks()["layer2.1"]
    x = torch.randn(3, block.conv1.in_channels, 6, 6)
    gates = [torch.randint(0, 2, (3, 1, block.width)).float() for _ in block.parts]
    block.gates[BLOCK] = (*gates, None)[:2]
    together = block(x)
    for index in range(3):
        block.gates[BLOCK] = (*(gate[index, 0] for gate in gates), None)[:2]
        torch.testing.assert_close(block(x[index : index + 1])[0], together[index])


def test_imagenet_weights_for_a_cut_backbone_are_a_user_error():
    with pytest.raises(UserError, match=r"--pretrained_backbone: found --cfgs that cut the backbone"):
        Backbone("resnet18", "layer3", False, "BatchNorm2d", pretrained=True, widths=SLIM["resnet18"])


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect"}, {"padding": "same"}])
def test_a_convolution_that_cannot_be_cut_is_a_user_error(options):
    block = torchvision.models.get_model("resnet18").layer1[0]
    block.conv2 = torch.nn.Conv2d(64, 64, 3, **{"padding": 1, **options})
    with pytest.raises(
        UserError, match=r"--backbone: found Conv2d\(64, 64, .*expected one group and a number of zeros"
    ):
        ResidualBlock(block, 64)
