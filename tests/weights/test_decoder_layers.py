"""The first decoder layers of a checkpoint: the same outputs as after those layers of the whole detector."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models.config import NetworkConfig, TrainedDetectorConfig
from models.widths import Widths
from pruning.kept_channels import Kept, all_kept
from tests.pruning.tiny import VARIANTS, pictures, tiny_args, tiny_detector
from util.errors import UserError
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint, save_checkpoint
from weights.decoder_layers import first_layers, with_typed_layers
from weights.formats import Checkpoint

LAYERS = 3
each_variant = pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)


def half(kept: Kept, heads: int) -> Kept:
    """The first half of each head's channels."""
    return {
        part: channels.view(heads, -1)[:, : len(channels) // heads // 2].flatten() for part, channels in kept.items()
    }


def saved(path: Path, network: str, *, is_search: bool = False, is_slim: bool = False) -> Path:
    """A checkpoint of three decoder layers: dense, cut (slim), or the output of a search."""
    widths = Widths.parse([[[16, 24]], [[16, 8, 24], [8, 24, 16], [24, 16, 8]]]) if is_slim else None
    network = f"{network} --dec_layers {LAYERS}"
    model, _, _ = tiny_detector(network, widths)
    args = tiny_args(network, widths)
    kept = None
    if is_search:
        modules = model.prunable_modules()
        kept = {name: half(all_kept(module), module.nheads) for name, module in modules.items()}
        widths = Widths.parse([[[16, 16]], [[16, 16, 16]] * LAYERS])
    save_checkpoint(path, state_dict=model.state_dict(), widths=widths or model.widths, full_widths=model.widths,
                    arguments={**vars(args), "cfgs": None if is_search else widths}, num_classes=7,
                    kept=kept)  # fmt: skip
    return path


def detector_of(checkpoint: Checkpoint) -> torch.nn.Module:
    options = options_for(TrainedDetectorConfig(), checkpoint)
    return build_detector(options, checkpoint)[0].eval()


@each_variant
@pytest.mark.parametrize("kind", [{}, {"is_slim": True}, {"is_search": True}], ids=["dense", "slim", "search"])
def test_the_first_layers_give_what_the_whole_detector_gives_after_them(tmp_path, network, kind):
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", network, **kind))
    images, _ = pictures()
    with torch.no_grad():
        outputs = detector_of(checkpoint)(images)
        whole = [*outputs["aux_outputs"], outputs]
        for count in range(1, LAYERS + 1):
            model = detector_of(first_layers(checkpoint, count))
            assert len(model.widths.decoder) == count == len(model.transformer.decoder.layers)
            found = model(images)
            assert len(found["aux_outputs"]) == count - 1
            for ours, theirs in zip([*found["aux_outputs"], found], whole, strict=False):
                assert torch.equal(ours["pred_logits"], theirs["pred_logits"])
                assert torch.equal(ours["pred_boxes"], theirs["pred_boxes"])


def test_a_checkpoint_of_the_first_layers_describes_itself(tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", "", is_search=True))
    fewer = first_layers(checkpoint, 2)
    assert fewer.widths.decoder == checkpoint.widths.decoder[:2] and fewer.widths.encoder == checkpoint.widths.encoder
    assert len(fewer.full_widths.decoder) == 2 and fewer.arguments["dec_layers"] == 2
    assert not any(name.startswith("decoder.2.") for name in fewer.kept) and "decoder.1.ffn" in fewer.kept
    assert fewer.remark == f"{tmp_path / 'a.pth'}: using the first 2 of its 3 decoder layers"
    assert first_layers(checkpoint, 3) is checkpoint and checkpoint.remark is None
    assert first_layers(fewer, 1).layers_in_file == 3


def test_only_a_typed_number_takes_fewer_layers_and_more_are_refused(tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", ""))
    two = NetworkConfig(dec_layers=2)
    assert with_typed_layers(checkpoint, two, ()) is checkpoint
    assert len(with_typed_layers(checkpoint, two, {"dec_layers"}).widths.decoder) == 2
    with pytest.raises(UserError, match=r"^--dec_layers 4: .*a\.pth has 3 decoder layers, expected 1 to 3$"):
        with_typed_layers(checkpoint, NetworkConfig(dec_layers=4), {"dec_layers"})


def test_a_training_run_does_not_continue_with_fewer_layers(tmp_path):
    checkpoint = dataclasses.replace(read_checkpoint(saved(tmp_path / "a.pth", "")), training={"epoch": 1})
    assert first_layers(checkpoint, 2).training is None and first_layers(checkpoint, 3).training == {"epoch": 1}


def test_layers_of_foreign_weights_are_counted(tmp_path):
    model = tiny_detector(f"--dec_layers {LAYERS}")[0]
    torch.save({"model": model.state_dict()}, tmp_path / "foreign.pth")
    typed = {"backbone": "resnet_tiny", "hidden_dim": 32, "nheads": 4, "dim_feedforward": 32, "num_queries": 5}
    options = TrainedDetectorConfig.from_values(typed)
    checkpoint = read_checkpoint(tmp_path / "foreign.pth")
    assert options_for(options, checkpoint, typed).dec_layers == LAYERS
    assert options_for(options, first_layers(checkpoint, 1), typed).dec_layers == 1
