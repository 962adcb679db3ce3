"""Parameters and GMACs: the published figures, and what torch itself counts on a real forward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import build
from models.config import DetectorConfig
from models.widths import Widths
from pruning.cost import (
    GIGA,
    block_macs,
    block_params,
    convolutions_of,
    cost_of,
    count_parameters,
    macs_per_channel,
    module_macs,
    module_params,
    params_by_widths,
    params_per_channel,
    products_of,
    step_shares,
)
from tests.pruning.tiny import VARIANTS, tiny_detector
from tools.cost import main
from util.errors import UserError

GP = "[[[152,416],[232,1408],[216,1504],[232,1248],[224,1472],[248,1344]],"
GP += "[[8,136,544],[184,192,1216],[240,168,1920],[232,256,800],[256,192,960],[256,216,1216]]]"
MGP = "[[[160,32],[176,672],[216,608],[224,1344],[248,1248],[248,1152]],"
MGP += "[[8,96,640],[120,120,1248],[224,160,1120],[176,144,576],[224,256,672],[216,152,1472]]]"
BASIC = [[64, 7], [128, 128], [1, 256], [512, 300]]
BOTTLENECK = [[64, 7, 64], [128, 128, 1, 50], [256, 256, 30, 256, 256, 100]]
FIGURES = {
    "dense": (None, 19_667_474, 43_694_977, "15.90", "12.23", "11.23"),
    "gp": (GP, 12_863_330, 36_890_833, "11.51", "8.53", "7.73"),
    "mgp": (MGP, 10_467_714, 34_495_217, "9.76", "7.04", "6.30"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_published_figures(name):
    given, transformer_params, params, *gmacs = FIGURES[name]
    with torch.device("meta"):
        model, _, _ = build(DetectorConfig(num_classes=91, cfgs=given))
    cost = cost_of(model)
    assert (cost.transformer_params, cost.params) == (transformer_params, params)
    found = (cost.gmacs, cost.gmacs_without_attention_products, cost.gmacs_linear_modules)
    assert [f"{value:.2f}" for value in found] == gmacs


def test_the_backbone_of_800_x_1088_pixels():
    with torch.device("meta"):
        model = tiny_detector("--backbone resnet50")[0].eval()
        images = torch.empty(1, 3, 800, 1088)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.backbone[0](images, ["layer4"])
    macs = sum(p.macs for p in convolutions_of(model, (800, 1088)) if p.step.startswith("backbone."))
    assert counter.get_total_flops() == 2 * macs
    assert f"{macs / GIGA:.1f}" == "70.9"


def test_the_command_prints_them(capsys):
    main(["--cfgs", *MGP.replace(",", ", ").split()])
    printed = capsys.readouterr().out
    figures = ("19,667,474", "10,467,714", "-46.8%", "34,495,217", "9.76", "-38.6%", "-42.5%", "-43.9%")
    for figure in (*figures, "87.53", "81.38"):
        assert figure in printed


@pytest.mark.parametrize(
    ("options", "cfgs", "size"),
    [
        ("", None, (64, 96)),
        ("--num_patterns 2 --return_layer layer3", None, (70, 33)),
        ("--enc_layers 2", "[[[4,8],[16,24]],[[8,12,16],[4,28,32]]]", (64, 64)),
        (VARIANTS["deformable"], None, (70, 33)),
        (f"{VARIANTS['deformable']} --enc_layers 2", "[[[4,8],[16,24]],[[8,12,16],[4,28,32]]]", (64, 96)),
        ("--backbone resnet18 --dilation", f"[[[4,8]],[[8,12,16],[4,28,32]],{BASIC}]", (70, 33)),
        (f"{VARIANTS['deformable']} --backbone resnet50", f"[[[4,8]],[[8,12,16],[4,28,32]],{BOTTLENECK}]", (64, 96)),
    ],
)
def test_macs_are_those_of_a_forward(options, cfgs, size):
    """But for the dense model's last anchor refinement, which nothing reads, and the sampling, which is no product."""
    model = tiny_detector(options, cfgs and Widths.parse(cfgs))[0].eval()
    images = [torch.zeros(3, *size)]
    products = products_of(model, size)
    unread = [p.macs for p in products if p.part == "anchor refinement"][-1]
    uncounted = sum(p.macs for p in products if p.part == "sampling") if "deformable" in options else unread
    # With gradients the CPU's attention pads no widths for its kernel: zeros are no part of the cost.
    with FlopCounterMode(display=False) as counter:
        state = model.prepare(images)
    front = sum(p.macs for p in convolutions_of(model, size))
    assert counter.get_total_flops() == 2 * front
    assert cost_of(model, size).detector_gmacs == (front + sum(p.macs for p in products)) / GIGA
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.outputs(model.run_steps(state))
    assert counter.get_total_flops() == 2 * (sum(p.macs for p in products) - uncounted)


@pytest.mark.parametrize("word", ["--resume a.pth", "--coco_path a", "--device cpu", "--image_size 64", "--lr 1",
                                  "--anchor_eps 1e-4"])  # fmt: skip
def test_options_that_change_no_figure_are_refused(word):
    with pytest.raises(UserError, match=f"unrecognized arguments: {word}"):
        main(word.split())
    with pytest.raises(UserError, match="--dec_n_points: dn_dab_detr has one level and no points"):
        main(["--dec_n_points", "8"])


def test_sampling_costs_five_products_for_each_point_and_channel():
    model = tiny_detector(VARIANTS["deformable"])[0]
    found = {p.step: p.macs for p in products_of(model, (64, 64)) if p.part == "sampling"}
    # 8 x 8, 4 x 4 and 2 x 2 pixels; 3 levels, 2 points in the encoder and 4 in the decoder; 32 channels; 5 queries.
    assert found["encoder.0.attention"] == 5 * 84 * 3 * 2 * 32
    assert found["decoder.1.cross_attention"] == 5 * 5 * 3 * 4 * 32


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_a_channel_costs_what_a_head_of_channels_less_saves(network):
    whole = tiny_detector(network)[0]
    macs, params = macs_per_channel(whole, (64, 96)), params_per_channel(whole)

    def totals(model):
        return sum(p.macs for p in products_of(model, (64, 96))), count_parameters(model)

    macs_before, params_before = totals(whole)
    for name, module in whole.prunable_modules().items():
        slim = tiny_detector(network, whole.widths.replace(name, module.width - module.nheads))[0]
        macs_after, params_after = totals(slim)
        assert macs_before - macs_after == module.nheads * macs[name]
        assert params_before - params_after == module.nheads * params[name]


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_a_modules_cost_equals_what_a_cut_saves(network):
    for full in (tiny_detector(network)[0].widths, None):
        whole = tiny_detector(network, full or tiny_detector(network)[0].widths.replace("encoder.0.ffn", 0))[0]
        macs, params = module_macs(whole, (64, 96)), module_params(whole)
        before = cost_of(whole, (64, 96))
        for name, module in whole.prunable_modules().items():
            for width in (0, module.nheads, module.width - module.nheads):
                slim = tiny_detector(network, whole.widths.replace(name, width))[0]
                after = cost_of(slim, (64, 96))
                saved = params[name].at(module.width) - params[name].at(width)
                assert before.transformer_params - after.transformer_params == saved
                saved = macs[name].at(module.width) - macs[name].at(width)
                assert before.gmacs - after.gmacs == pytest.approx(saved / GIGA, abs=1e-12)
                assert params_by_widths(whole)(whole.widths.replace(name, width)) == after.transformer_params


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_removed_modules_compute_no_product(network):
    whole = tiny_detector(network)[0]
    widths = whole.widths
    for name in widths.names():
        widths = widths.replace(name, 0)
    slim = tiny_detector(network, widths)[0].eval()
    products = {(p.step, p.part): p.macs for p in products_of(slim, (64, 96)) if p.macs}
    assert {part for _, part in products} == {"anchor refinement", "class_embed"} | (
        set() if "deformable" in network else {"bbox_embed"}
    )
    with torch.no_grad():
        state = slim.prepare(torch.zeros(1, 3, 64, 96))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            slim.outputs(slim.run_steps(state))
    # The deformable variant's refinement and heads, the dense one's without the unused last refinement.
    unused = 0 if "deformable" in network else products["decoder.1.ffn", "anchor refinement"]
    assert counter.get_total_flops() == 2 * (sum(products.values()) - unused)


@pytest.mark.parametrize(
    ("network", "name"),
    [("--backbone resnet18", "layer1.0"), ("--backbone resnet18 --batch_norm_type BatchNorm2d", "layer4.1"),
     ("--backbone resnet50", "layer2.0"),
     (f"{VARIANTS['deformable']} --backbone resnet50 --batch_norm_type BatchNorm2d", "layer3.5")],
)  # fmt: skip
def test_a_blocks_cost_table_equals_what_a_cut_saves(network, name):
    with torch.device("meta"):
        whole = tiny_detector(network)[0]
        tables = block_params(whole), block_macs(whole, (64, 96))
        before, name = cost_of(whole, (64, 96)), f"backbone.{name}"
        assert list(tables[0]) == list(tables[1]) == [n for n in whole.prunable_modules("detector") if "layer" in n]
        for width in (0, 1, 17, whole.widths_in("detector").of(name)):
            slim = tiny_detector(network, whole.widths_in("detector").replace(name, width))[0]
            after = cost_of(slim, (64, 96))
            assert before.params - after.params == tables[0][name][-1] - tables[0][name][width]
            saved = tables[1][name][-1] - tables[1][name][width]
            assert before.detector_gmacs - after.detector_gmacs == pytest.approx(saved / GIGA)
            assert before.gmacs == after.gmacs


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_shares_of_the_steps_are_those_of_the_products(network):
    model = tiny_detector(network)[0]
    shares = step_shares(model, (64, 64))
    assert list(shares) == list(model.step_names)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_the_projection_counts_with_the_last_block(network):
    model = tiny_detector(network)[0]
    shares = step_shares(model, (64, 64), "detector")
    assert list(shares) == [*model.block_names, *model.step_names] and sum(shares.values()) == pytest.approx(1)
    convolutions = {product.step: product.macs for product in convolutions_of(model, (64, 64))}
    projection = sum(macs for name, macs in convolutions.items() if name.startswith("input_proj"))
    last = model.block_names[-1]
    of_block = sum(macs for name, macs in convolutions.items() if f".{last.removeprefix('backbone.')}." in name)
    transformer = sum(product.macs for product in products_of(model, (64, 64)))
    of_steps = sum(shares[name] for name in model.step_names)
    assert shares[last] / of_steps == pytest.approx((of_block + projection) / transformer)
    assert projection > 0 and of_block > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_counting_leaves_the_detector_as_it_was(variant):
    model = tiny_detector(f"{VARIANTS[variant]} --batch_norm_type BatchNorm2d")[0].train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cost_of(model, (64, 96))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
