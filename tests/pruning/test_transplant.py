"""A gated detector and the one cut to the same channels compute the same function."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.gates import gates_applied
from pruning.kept_channels import all_kept, check_kept, none_kept, width_of
from pruning.transplant import cut_state_dict, paper_masks_to_kept, slim_copy, widths_after
from tests.pruning.tiny import VARIANTS, pictures, randomise_norms, tiny_detector
from util.checkpoint import load_weights
from util.errors import UserError

# Of which the backbone is cut too.
DETECTORS = {
    "basic": "--backbone resnet18 --batch_norm_type BatchNorm2d",
    "basic, dilated, deformable": "--backbone resnet18 --dilation "
    + VARIANTS["deformable"].replace("layer3", "layer4"),
    "bottleneck, deformable": f"{VARIANTS['deformable']} --backbone resnet50 --batch_norm_type BatchNorm2d",
    "bottleneck, dilated": "--backbone resnet50 --dilation",
}


@functools.cache
def whole_detector(words):
    model = tiny_detector(words)[0]
    randomise_norms(model)
    return model.double()  # rounding in float32 grows to 1e-5 behind so many layers


WHOLE_OF = {variant: tiny_detector(words)[0] for variant, words in VARIANTS.items()}
WHOLE = WHOLE_OF["dense"]
IMAGES, TARGETS = pictures()


@st.composite
def kept_sets(draw, model, scope="transformer"):
    """Random channels of every module, equally many in each head, none up to all; query and value sets may differ."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kept = {}
    for name, module in model.prunable_modules(scope).items():
        head_width = module.width // module.nheads
        count = draw(st.one_of(st.just(0), st.integers(0, head_width)))

        def indices(module=module, head_width=head_width, count=count):
            heads = [torch.randperm(head_width, generator=generator)[:count] for _ in range(module.nheads)]
            return torch.cat([chosen.sort().values + head * head_width for head, chosen in enumerate(heads)])

        first, *others = module.parts
        kept[name] = {first: indices()}
        kept[name] |= {part: kept[name][first] if draw(st.booleans()) else indices() for part in others}
    return kept


def cut_model(model, kept, words=None):
    """The slim model, of the options `words`, with the weights that `kept` leaves."""
    if words is None:
        words = next(VARIANTS[name] for name, whole in WHOLE_OF.items() if type(whole) is type(model))
    slim = tiny_detector(words, cfgs=widths_after(model.widths_in("detector"), kept), seed=1)[0]
    slim.to(next(model.parameters()).dtype)
    load_weights(slim, cut_state_dict(model.state_dict(), kept, model.prunable_modules("detector")))
    return slim


def outputs_of(model, training):
    torch.manual_seed(0)
    model.train(training)
    images = [image.to(next(model.parameters()).dtype) for image in IMAGES]
    with torch.no_grad():
        outputs = model(images, TARGETS if training else None)
    layers = [*outputs["aux_outputs"], outputs, *([outputs["denoising"]] if training else [])]
    return [layer[key] for layer in layers for key in ("pred_logits", "pred_boxes")]


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20, deadline=None)
@given(data=st.data(), training=st.booleans())
def test_gated_and_cut_agree(variant, data, training):
    whole = WHOLE_OF[variant]
    kept = data.draw(kept_sets(whole))
    slim = cut_model(whole, kept)
    with gates_applied(whole, kept):
        expected = outputs_of(whole, training)
    for found, wanted in zip(outputs_of(slim, training), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", DETECTORS.values(), ids=DETECTORS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_backbone_and_transformer_gated_and_cut_at_once_agree(words, data):
    whole = whole_detector(words)
    kept = data.draw(kept_sets(whole, "detector"))
    slim = cut_model(whole, kept, words)
    copied = slim_copy(whole, cut_state_dict(whole.state_dict(), kept, whole.prunable_modules("detector")),
                       slim.widths)  # fmt: skip
    with gates_applied(whole, kept):
        expected = outputs_of(whole, False)
    assert {name: width_of(sets) for name, sets in kept.items()} == dict(slim.widths_in("detector").items())
    for found, found_of_copy, wanted in zip(outputs_of(slim, False), outputs_of(copied, False), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
        assert torch.equal(found, found_of_copy)
    shapes = [[str(module) for module in model.backbone.modules()] for model in (slim, copied)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("words", [*VARIANTS.values(), *DETECTORS.values()], ids=[*VARIANTS, *DETECTORS])
def test_a_detector_without_any_branch_adds_constants_only(words):
    whole = whole_detector(words)
    modules = whole.prunable_modules("detector")
    kept = {name: none_kept(module) for name, module in modules.items()}
    with gates_applied(whole, kept):
        expected = outputs_of(whole, False)
    slim = cut_model(whole, kept, words)
    assert not slim.prunable_modules("detector")
    assert all(value.numel() for value in slim.state_dict().values())
    branches = {piece.key for module in modules.values() for piece in module.parameter_slices()}
    assert not branches & {*slim.state_dict()}
    for found, wanted in zip(outputs_of(slim, False), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("words", [*VARIANTS.values(), "--backbone resnet50"], ids=[*VARIANTS, "bottleneck"])
def test_a_removed_branch_trains_its_bias_and_runs_no_layer(words):
    whole = whole_detector(words)
    modules = whole.prunable_modules("detector")
    gone = [name for place, name in enumerate(modules) if place % 2]
    slim = cut_model(whole, {name: none_kept(modules[name]) for name in gone}, words)
    called = []
    for name, module in slim.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    outputs_of(slim, False)
    holders = {piece.key.rpartition(".")[0] for name in gone for piece in modules[name].parameter_slices()}
    left = {modules[name].bias_name for name in gone}
    assert not {name for name in called if name in holders - left - {"transformer.encoder.layers.0"}}
    slim.train()
    images = [image.double() for image in IMAGES]
    sum(value.sum() for value in (slim(images, TARGETS)["pred_logits"], slim(images)["pred_boxes"])).backward()
    for name in gone:
        bias = slim.get_submodule(modules[name].bias_name).bias
        trained = not name.startswith("backbone.layer1.") and isinstance(bias, torch.nn.Parameter)
        assert not trained or bias.grad.abs().sum() > 0, name


@pytest.mark.parametrize("words", DETECTORS.values(), ids=DETECTORS)
def test_one_channel_of_every_block_can_be_kept(words):
    whole = whole_detector(words)
    kept = {name: {part: torch.tensor([place + 3]) for place, part in enumerate(module.parts)}
            for name, module in whole.prunable_modules("detector").items() if name.startswith("backbone.")}  # fmt: skip
    with gates_applied(whole, kept):
        expected = outputs_of(whole, False)
    slim = cut_model(whole, kept, words)
    assert {width for stage in slim.backbone[0].widths for width in stage} == {1}
    for found, wanted in zip(outputs_of(slim, False), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_cut_model_can_be_cut_again(variant, data):
    slim = cut_model(WHOLE_OF[variant], data.draw(kept_sets(WHOLE_OF[variant])))
    again = _one_channel_a_head(slim)
    slimmer = cut_model(slim, again)
    with gates_applied(slim, again):
        expected = outputs_of(slim, False)
    for found, wanted in zip(outputs_of(slimmer, False), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def _one_channel_a_head(model):
    firsts = {name: torch.arange(m.nheads) * (m.width // m.nheads) for name, m in model.prunable_modules().items()}
    return {name: dict.fromkeys(all_kept(m), firsts[name]) for name, m in model.prunable_modules().items()}


@pytest.mark.parametrize("whole", WHOLE_OF.values(), ids=WHOLE_OF)
def test_gates_change_the_outputs_and_go_away(whole):
    before = outputs_of(whole, False)
    with gates_applied(whole, _one_channel_a_head(whole)):
        between = outputs_of(whole, False)
    assert not torch.allclose(before[0], between[0], atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs_of(whole, False), strict=True))


@pytest.mark.parametrize("whole", WHOLE_OF.values(), ids=WHOLE_OF)
def test_everything_kept_changes_nothing(whole):
    kept = {name: all_kept(module) for name, module in whole.prunable_modules().items()}
    cut = cut_state_dict(whole.state_dict(), kept, whole.prunable_modules())
    assert all(torch.equal(value, cut[key]) for key, value in whole.state_dict().items())


BAD_KEPT = {
    "an unknown module": ({"encoder.7.ffn": {"hidden": [0]}}, "encoder.7.ffn"),
    "unequal heads": ({"encoder.0.attention": {"query": [0, 1, 8, 16], "value": [0, 8, 16, 24]}}, "equally many"),
    "a channel too many": ({"encoder.0.ffn": {"hidden": [32]}}, "0 to 31"),
    "a channel twice": ({"encoder.0.ffn": {"hidden": [3, 3]}}, "ascending"),
    "no query": ({"encoder.0.attention": {"query": [], "value": [0, 8, 16, 24]}}, "different numbers"),
    "a channel of two axes": ({"encoder.0.ffn": {"hidden": [[3]]}}, "found 2 axes"),
    "a part too few": ({"encoder.0.attention": {"query": [0, 8, 16, 24]}}, "expected"),
    "different numbers": (
        {"encoder.0.attention": {"query": [0, 8, 16, 24], "value": list(range(32))}},
        "different numbers",
    ),
}


@pytest.mark.parametrize("name", BAD_KEPT)
def test_channels_that_cannot_be_cut_are_a_user_error(name):
    lists, message = BAD_KEPT[name]
    kept = {m: {p: torch.tensor(i, dtype=torch.int64) for p, i in sets.items()} for m, sets in lists.items()}
    with pytest.raises(UserError, match=message), gates_applied(WHOLE, kept):
        pass


def test_check_kept_takes_a_whole_module():
    for module in WHOLE.prunable_modules().values():
        check_kept(module, all_kept(module))


def test_a_parameter_too_small_for_the_kept_channels_is_a_user_error():
    weights = {**WHOLE.state_dict(), "transformer.encoder.layers.0.linear1.bias": torch.zeros(8)}
    kept = {"encoder.0.ffn": {"hidden": torch.tensor([9])}}
    with pytest.raises(UserError, match=r"linear1\.bias"):
        cut_state_dict(weights, kept, WHOLE.prunable_modules())


def test_a_missing_parameter_is_a_user_error():
    kept = {"encoder.0.ffn": {"hidden": torch.tensor([0])}}
    with pytest.raises(UserError, match=r"no transformer\.encoder\.layers\.0\.linear1\.weight"):
        cut_state_dict({}, kept, WHOLE.prunable_modules())


def test_the_papers_masks_are_read_and_cut_without_equal_heads():
    mask = torch.zeros(1, 1, 32)
    mask[..., [0, 1, 2, 9]] = 0.5
    masks = {
        "transformer.encoder.layers.0.select1.prune_a": mask,
        "transformer.encoder.layers.0.select2.prune_a": mask.flip(-1),
        "transformer.decoder.layers.0.select1.prune_a": mask,
        "transformer.decoder.layers.0.select2.prune_a": torch.ones(1, 1, 32),
        "transformer.decoder.layers.1.select3.prune_a": mask - 0.25,
    }
    kept = paper_masks_to_kept({**WHOLE.state_dict(), **masks})
    assert {name: {part: i.tolist() for part, i in sets.items()} for name, sets in kept.items()} == {
        "encoder.0.attention": {"query": [0, 1, 2, 9], "value": [0, 1, 2, 9]},
        "encoder.0.ffn": {"hidden": [22, 29, 30, 31]},
        "decoder.0.self_attention": {"query": [0, 1, 2, 9], "value": [0, 1, 2, 9]},
        "decoder.0.cross_attention": {"query": list(range(32)), "value": list(range(32))},
        "decoder.1.ffn": {"hidden": [0, 1, 2, 9]},
    }
    slim = cut_model(WHOLE, kept)
    assert slim.widths.of("encoder.0.attention") == 4
    rows = slim.state_dict()["transformer.decoder.layers.0.sa_v_proj.weight"]
    assert torch.equal(rows, WHOLE.state_dict()["transformer.decoder.layers.0.sa_v_proj.weight"][[0, 1, 2, 9]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_masks_of_any_type_keep_the_same_channels(dtype):
    mask = torch.zeros(1, 1, 32)
    mask[..., [0, 5, 31]] = 1
    kept = paper_masks_to_kept({"transformer.encoder.layers.0.select2.prune_a": mask.to(dtype)})
    assert kept["encoder.0.ffn"]["hidden"].tolist() == [0, 5, 31]


@pytest.mark.parametrize(
    ("key", "mask", "message"),
    [
        ("transformer.encoder.layers.0.select1.prune_a", torch.zeros(1, 1, 32), "keeps no channel"),
        ("transformer.encoder.layers.0.select3.prune_a", torch.ones(1, 1, 32), "found mask"),
        ("backbone.select1.prune_a", torch.ones(1, 1, 32), "found mask"),
    ],
)
def test_invalid_masks_are_a_user_error(key, mask, message):
    with pytest.raises(UserError, match=message):
        paper_masks_to_kept({key: mask})


def test_a_slim_copy_reports_its_shapes():
    kept = {name: all_kept(module) for name, module in WHOLE.prunable_modules().items()}
    kept["encoder.0.ffn"] = {"hidden": torch.tensor([1, 5, 7])}
    widths = WHOLE.widths.replace("encoder.0.ffn", 3)
    slim = slim_copy(WHOLE, cut_state_dict(WHOLE.state_dict(), kept, WHOLE.prunable_modules()), widths)
    layer = slim.transformer.encoder.layers[0]
    assert (layer.linear1.out_features, layer.linear2.in_features) == (3, 3)
    assert slim.bbox_embed is slim.transformer.decoder.bbox_embed
