"""Checkpoints of every format load into dense and slim detectors, or give a one-line error."""

import argparse

import pytest
import torch

import main
from main import get_args_parser
from models.config import DetectorConfig, NetworkConfig
from models.widths import Widths
from pruning.transplant import cut_state_dict, widths_after
from runs.config import TrainingOptions
from tests.pruning.tiny import NETWORK, VARIANTS, pictures, randomise_norms, tiny_args, tiny_detector
from tests.tiny_run import options
from util.checkpoint import load_weights, rename_encoder_attention
from util.cli import parse
from util.errors import UserError
from weights.build import build_detector, options_for
from weights.checkpoint_file import plain_arguments, read_checkpoint, save_checkpoint, slim_state_dict
from weights.stored_options import take_from_checkpoint
from weights.strip_optimizer import strip_optimizer

FULL = Widths.dense(1, 2, 32, 32)
SLIM = Widths.parse([[[16, 20]], [[8, 32, 16], [32, 4, 32]]])


def outputs_of(model) -> torch.Tensor:
    """Logits of a detector for fixed pictures."""
    with torch.no_grad():
        return model.eval()(pictures()[0])["pred_logits"]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("to_slim_names", [False, True])
@pytest.mark.parametrize("from_slim_names", [False, True])
def test_dense_and_slim_builds_load_each_others_names(from_slim_names, to_slim_names, prefix):
    source = tiny_detector(cfgs=FULL if from_slim_names else None, seed=1)[0]
    target = tiny_detector(cfgs=FULL if to_slim_names else None, seed=2)[0]
    load_weights(target, {prefix + key: value for key, value in source.state_dict().items()})
    assert torch.equal(outputs_of(source), outputs_of(target))


def test_half_precision_one_name_of_the_box_head_and_batch_counters_load():
    source = tiny_detector("--batch_norm_type BatchNorm2d", seed=1)[0]
    weights = {key: value.half() if value.is_floating_point() else value for key, value in source.state_dict().items()}
    for dropped in ("bbox_embed.", "transformer.decoder.bbox_embed."):
        target = tiny_detector(seed=2)[0]
        load_weights(target, {key: value for key, value in weights.items() if not key.startswith(dropped)})
        assert target.class_embed.weight.dtype == torch.float32
        assert torch.allclose(outputs_of(target), outputs_of(source), atol=0.05)
    counted = tiny_detector("--batch_norm_type BatchNorm2d", seed=2)[0]
    load_weights(counted, {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")})


def test_mismatched_weights_are_an_error_with_keys_and_shapes_and_change_nothing():
    model = tiny_detector()[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = {key: value + 1 for key, value in before.items()}
    weights["class_embed.bias"] = torch.zeros(3)
    weights["input_proj.extra"] = weights.pop("input_proj.bias")
    with pytest.raises(UserError) as error:
        load_weights(model, weights, "a.pth")
    message = str(error.value)
    assert message.startswith("a.pth: ") and "class_embed.bias has the shape 3, expected 7" in message
    assert (
        "input_proj.bias is missing, expected 32" in message and "input_proj.extra (32) is not in the model" in message
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_number_of_layers_is_named_in_the_error():
    weights = tiny_detector("--dec_layers 3")[0].state_dict()
    with pytest.raises(UserError, match=r"found 3 decoder layers, expected 2 \(--dec_layers\); .*; and \d+ more$"):
        load_weights(tiny_detector()[0], weights, "a.pth")


def test_dn_detrs_release_with_its_namespace(tmp_path):
    model = tiny_detector(seed=1)[0]
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-4)}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert (checkpoint.kind, checkpoint.widths, checkpoint.num_classes) == ("release", FULL, 7)
    assert checkpoint.training is None and not checkpoint.is_search


def test_variant_and_widths_are_read_from_the_deformable_release(tmp_path):
    model = tiny_detector(VARIANTS["deformable"], cfgs=SLIM, seed=1)[0]
    message = argparse.Namespace(num_feature_levels=3, enc_n_points=2, dec_n_points=4, nheads=4)
    torch.save({"model": model.state_dict(), "args": message}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert (checkpoint.kind, checkpoint.widths, checkpoint.num_classes) == ("release", SLIM, 7)
    config = NetworkConfig.from_values(vars(tiny_args("--return_layer layer3")))
    config = take_from_checkpoint(config, {"return_layer"}, checkpoint)
    assert (config.modelname, config.num_feature_levels, config.enc_n_points) == ("dn_dab_deformable_detr", 3, 2)
    target = tiny_detector(VARIANTS["deformable"], cfgs=config.cfgs, seed=2)[0]
    load_weights(target, checkpoint.state_dict, checkpoint.path)
    assert torch.equal(outputs_of(model), outputs_of(target))
    with pytest.raises(UserError, match=r"--modelname dn_dab_detr: .* was made with dn_dab_deformable_detr"):
        take_from_checkpoint(NetworkConfig(), {"modelname"}, checkpoint)


def test_widths_are_read_from_the_papers_slim_model(tmp_path):
    model = tiny_detector(cfgs=SLIM, seed=1)[0]
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert (checkpoint.kind, checkpoint.widths) == ("paper_slim", SLIM)
    target = tiny_detector(cfgs=checkpoint.widths, seed=2)[0]
    load_weights(target, checkpoint.state_dict, checkpoint.path)
    assert torch.equal(outputs_of(model), outputs_of(target))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".half"])
@pytest.mark.parametrize("is_search", [False, True])
def test_every_format_of_ours_stores_a_cut_backbone(tmp_path, variant, suffix, is_search):
    pytest.importorskip("safetensors")
    words = f"{VARIANTS[variant]} --backbone resnet18 --batch_norm_type BatchNorm2d"
    whole = tiny_detector(words, seed=1)[0]
    randomise_norms(whole)
    kept = {"backbone.layer1.1": {"inner": torch.tensor([3, 63])}, "encoder.0.ffn": {"hidden": torch.arange(20)}}
    widths = widths_after(whole.widths_in("detector"), kept)
    slim = tiny_detector(words, widths, seed=2)[0]
    load_weights(slim, cut_state_dict(whole.state_dict(), kept, whole.prunable_modules("detector")))
    source = whole if is_search else slim
    save_checkpoint(tmp_path / "a.pth", state_dict=source.state_dict(), widths=widths, full_widths=whole.widths,
                    kept=kept if is_search else None, arguments=vars(tiny_args(words, None if is_search else widths)),
                    num_classes=7, safetensors=True)  # fmt: skip
    if suffix == ".half":
        strip_optimizer(tmp_path / "a.pth", tmp_path / "a.half", half=True)
    checkpoint = read_checkpoint(tmp_path / f"a{suffix}")
    config = options_for(DetectorConfig.from_values(vars(tiny_args(words))), checkpoint)
    assert config.cfgs == widths and config.cfgs.of("backbone.layer1.1") == 2
    found = build_detector(config, checkpoint)[0]
    assert found.widths == widths
    torch.testing.assert_close(outputs_of(found), outputs_of(slim), rtol=0, atol=0.1 if suffix == ".half" else 0)


def test_kept_channels_beyond_a_block_are_an_error(tmp_path):
    model = tiny_detector("--backbone resnet18", seed=1)[0]
    kept = {"backbone.layer1.1": {"inner": torch.tensor([3, 64])}}
    widths = widths_after(model.widths_in("detector"), kept)
    save_checkpoint(tmp_path / "a.pth", state_dict=model.state_dict(), widths=widths, full_widths=model.widths,
                    kept=kept, arguments=vars(tiny_args("--backbone resnet18")), num_classes=7)  # fmt: skip
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: backbone\.layer1\.1: expected ascending inner channels from 0 to 63"):
        slim_state_dict(checkpoint, model)


@pytest.mark.parametrize("name", ["ema_model", "model_ema", "ema"])
def test_unused_averaged_weights_are_logged(tmp_path, coco, name):
    weights = tiny_detector()[0].state_dict()
    torch.save({"model": weights, name: {key: value + 1 for key, value in weights.items()}}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(checkpoint.state_dict["class_embed.bias"], weights["class_embed.bias"])
    assert f"a.pth: loading the weights under `model`, not the averaged ones under `{name}`" in checkpoint.remark
    words = f"{NETWORK} --eval --image_size 64 --device cpu --num_workers 0 --resume {tmp_path}/a.pth"
    main.main(*options(words, "--coco_path", coco, "--output_dir", tmp_path / "out"))
    assert checkpoint.remark in (tmp_path / "out" / "run.log").read_text()
    torch.save({"model": weights, name: None}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").remark is None


def test_the_papers_search_output_is_cut_by_its_masks(tmp_path):
    whole = tiny_detector(seed=1)[0]
    weights = rename_encoder_attention(whole.state_dict(), slim=True)
    masks = {"encoder.layers.0.select1": 8, "encoder.layers.0.select2": 12, "decoder.layers.1.select2": 4,
             "decoder.layers.1.select3": 20, "decoder.layers.0.select1": 32}  # fmt: skip
    for name, count in masks.items():
        mask = torch.zeros(1, 1, 32)
        mask[..., :count] = torch.linspace(0.1, 1, count)  # all in the first heads, so heads have unequal counts
        weights[f"transformer.{name}.prune_a"] = mask
    torch.save({"model": weights}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.kind == "paper_search" and checkpoint.is_search
    assert checkpoint.widths == Widths.parse([[[8, 12]], [[32, 32, 32], [32, 4, 20]]])
    slim = tiny_detector(cfgs=checkpoint.widths)[0]
    load_weights(slim, slim_state_dict(checkpoint, whole), checkpoint.path)
    assert torch.equal(
        slim.transformer.encoder.layers[0].linear1.weight, whole.transformer.encoder.layers[0].linear1.weight[:12]
    )
    assert outputs_of(slim).isfinite().all()


def test_a_mask_for_a_layer_without_weights_is_an_error(tmp_path):
    weights = rename_encoder_attention(tiny_detector()[0].state_dict(), slim=True)
    mask = {"transformer.encoder.layers.7.select2.prune_a": torch.ones(1, 1, 32)}
    torch.save({"model": {**weights, **mask}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: found a mask for encoder\.7\.ffn"):
        read_checkpoint(tmp_path / "a.pth")
    mask = {"transformer.encoder.layers.0.select2.prune_a": torch.ones(1, 1, 40)}
    torch.save({"model": {**weights, **mask}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: state dict: found kept channel 39"):
        slim_state_dict(read_checkpoint(tmp_path / "a.pth"), tiny_detector()[0])


def test_the_architecture_of_a_foreign_file_is_used_unless_typed(tmp_path):
    message = argparse.Namespace(dilation=True, num_queries=5, pe_temperatureH=7, lr=3, modelname="other", cfgs=[1],
                              enc_layers=1, dec_layers=2, hidden_dim=32, dim_feedforward=32, nheads=4,
                              backbone="resnet18", num_select=50)  # fmt: skip
    model = tiny_detector("--dilation --num_queries 5")[0]
    torch.save({"model": model.state_dict(), "args": message}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    args, typed = parse(get_args_parser(), ["--num_select", "9"])
    options = take_from_checkpoint(TrainingOptions.from_values(vars(args)), typed, checkpoint)
    found = options.detector
    assert (found.dilation, found.pe_temperatureH, found.hidden_dim, found.backbone) == (True, 7, 32, "resnet18")
    assert (found.num_select, options.training.lr, found.modelname, found.cfgs) == (9, 1e-4, "dn_dab_detr", None)


def saved(path, **more) -> None:
    """A search's output."""
    args = tiny_args()
    kept = {"encoder.0.ffn": {"hidden": torch.arange(20)}, **more.pop("kept", {})}
    save_checkpoint(path, state_dict=tiny_detector(seed=1)[0].state_dict(), widths=FULL.replace("encoder.0.ffn", 20),
                    full_widths=FULL, arguments=vars(args), num_classes=7, kept=kept, **more)  # fmt: skip


def test_a_search_output_is_read_back_as_written(tmp_path):
    saved(tmp_path / "a.pth", trace=[{"module": "encoder.0.ffn", "ap": 0.5}])
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.kind == "search" and checkpoint.widths.of("encoder.0.ffn") == 20
    assert checkpoint.arguments["nheads"] == 4 and checkpoint.trace == [{"module": "encoder.0.ffn", "ap": 0.5}]
    assert slim_state_dict(checkpoint, tiny_detector()[0])["transformer.encoder.layers.0.linear1.bias"].shape == (20,)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"decoder.0.self_attention": {"query": torch.arange(8), "value": torch.arange(8)}}, "expected equally many"),
        ({"encoder.9.ffn": {"hidden": torch.arange(8)}}, "encoder.9.ffn"),
        ({"encoder.0.ffn": {"hidden": torch.arange(99)}}, "from 0 to 31"),
    ],
)
def test_invalid_kept_channels_are_an_error(tmp_path, kept, message):
    saved(tmp_path / "a.pth", kept=kept)
    with pytest.raises(UserError, match=message) as error:
        slim_state_dict(read_checkpoint(tmp_path / "a.pth"), tiny_detector()[0])
    assert "a.pth" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "found format version 2, expected 1"),
        ({"widths": [[1]]}, "under `widths`"),
        ({"model": None}, "found NoneType under `model`, expected dict"),
        ({"model": {"a": 1}}, "found int under `model`"),
        ({"kept": [1]}, "found list under `kept`"),
        ({"num_classes": "many"}, "found str under `num_classes`, expected int"),
        ({"num_classes": 9}, "found 9 under `num_classes`, expected 7"),
        ({"model": {5: torch.ones(1)}}, "found the key 5 under `model`"),
        (
            {"kept": {"encoder.0.ffn": {"hidden": torch.arange(20.0)}}},
            "found torch.float32 under `kept.encoder.0.ffn.hid",
        ),
        ({"kept": {"encoder.0.ffn": torch.arange(20)}}, "found Tensor under `kept.encoder.0.ffn`"),
        ({"kept": {3: {"hidden": torch.arange(20)}}}, "found the key 3 under `kept`"),
    ],
)
def test_invalid_entries_in_our_files_are_an_error(tmp_path, change, message):
    saved(tmp_path / "a.pth")
    torch.save({**torch.load(tmp_path / "a.pth", weights_only=True), **change}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"nheads": "4"}, "found '4' under `args.nheads`, expected a whole number"),
        ({"hidden_dim": 32.5}, "found 32.5 under `args.hidden_dim`, expected a whole number"),
        ({"enc_layers": 0}, "found 0 under `args.enc_layers`, expected a whole number from 1 up"),
        ({"backbone": "vgg"}, "found 'vgg' under `args.backbone`, expected one of resnet18, "),
        ({"modelname": None}, "found None under `args.modelname`, expected one of dn_dab_detr"),
        ({"dilation": "no"}, "found 'no' under `args.dilation`, expected True or False"),
        ({"image_size": [1]}, "found .1. under `args.image_size`, expected a whole number"),
        ({"distill": 5}, "found 5 under `args.distill`, expected text"),
    ],
)
def test_invalid_stored_options_are_an_error(tmp_path, stored, message):
    saved(tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save({**content, "args": {**content["args"], **stored}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message) as error:
        take_from_checkpoint(TrainingOptions(), (), read_checkpoint(tmp_path / "a.pth"), continuing=True)
    assert "a.pth" in str(error.value)


def test_an_invalid_file_name_is_an_error():
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint("a" * 300)


def test_strip_optimizer_drops_training_state_and_keeps_values_beyond_half_precision(tmp_path):
    weights = dict(tiny_detector(seed=1)[0].state_dict())
    weights["class_embed.bias"] = torch.full((7,), 1e6)
    arguments = {"lr": 1, "output_dir": "here", "distill": "there"}
    training = {"optimizer": {"state": weights}, "epoch": 3}
    save_checkpoint(tmp_path / "a.pth", state_dict=weights, widths=FULL, full_widths=FULL, arguments=arguments,
                    num_classes=7, training=training)  # fmt: skip
    assert read_checkpoint(tmp_path / "a.pth").training["epoch"] == 3
    strip_optimizer(tmp_path / "a.pth", tmp_path / "b.pth", half=True)
    checkpoint = read_checkpoint(tmp_path / "b.pth")
    assert checkpoint.training is None and checkpoint.widths == FULL and checkpoint.arguments == {"lr": 1}
    assert checkpoint.state_dict["class_embed.weight"].dtype == torch.float16
    assert checkpoint.state_dict["class_embed.bias"].dtype == torch.float32
    torch.save({"model": weights}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="of the kind release"):
        strip_optimizer(tmp_path / "foreign.pth", tmp_path / "c.pth")


def test_arguments_are_stored_as_plain_values(tmp_path):
    args = {"cfgs": SLIM, "output_dir": tmp_path, "lr": 0.1, "resume": None, "strange": {1}}
    assert plain_arguments(args) == {"cfgs": SLIM.to_list(), "output_dir": str(tmp_path), "lr": 0.1, "resume": None}
