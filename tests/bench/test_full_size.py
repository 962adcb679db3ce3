"""Growing a detector: the same outputs where nothing but widths and encoder layers grow, and refusals."""

from pathlib import Path

import pytest
import torch

from bench.full_size import grow, spread_layers
from models import build
from models.config import DenoisingConfig, DetectorConfig
from models.widths import Widths
from tests.pruning.tiny import pictures, tiny_args, tiny_detector
from util.checkpoint import load_weights
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint, save_checkpoint

LARGER = {"hidden_dim": 64, "dim_feedforward": 96, "enc_layers": 3, "dec_layers": 2, "num_queries": 5}


def small_detector(more: str = "") -> torch.nn.Module:
    """A tiny detector whose norms, box head and labels are drawn too, so that none of them is left out unseen."""
    model = tiny_detector(more)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.startswith("bbox_embed"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def write(path: Path, model: torch.nn.Module, more: str = "") -> Path:
    args = tiny_args(more)
    full = Widths.dense(args.enc_layers, args.dec_layers, args.hidden_dim, args.dim_feedforward)
    save_checkpoint(path, state_dict=model.state_dict(), widths=model.widths, full_widths=full, arguments=vars(args),
                    num_classes=7)  # fmt: skip
    return path


def read(path: Path) -> torch.nn.Module:
    checkpoint = read_checkpoint(path)
    config = DetectorConfig.from_values({**checkpoint.arguments, "num_classes": 7, "cfgs": None})
    model = build(config, denoising=DenoisingConfig.from_values(checkpoint.arguments))[0]
    load_weights(model, checkpoint.state_dict, path)
    return model.eval()


def grown(tmp_path: Path, model: torch.nn.Module, more: str = "", decoder_from=None, **sizes: int) -> torch.nn.Module:
    grow(write(tmp_path / "small.pth", model, more), tmp_path / "grown.pth", {**LARGER, **sizes}, decoder_from, 0.5, 1)
    return read(tmp_path / "grown.pth")


def outputs(model: torch.nn.Module, denoising: bool = False) -> list[torch.Tensor]:
    """Logits and boxes of every layer, of the matching queries or of the denoising ones."""
    images, targets = pictures()
    torch.manual_seed(0)
    found = model(images, targets if denoising else None)
    layers = [found["denoising"]] if denoising else [found, *found["aux_outputs"]]
    return [layer[key] for layer in layers for key in ("pred_logits", "pred_boxes")]


@pytest.mark.parametrize("more", ["", "--transformer_activation relu --num_patterns 2"])
def test_wider_and_deeper_encoder_gives_the_same_outputs(tmp_path, more):
    small = small_detector(more)
    large = grown(tmp_path, small, more)
    for key in LARGER:
        assert read_checkpoint(tmp_path / "grown.pth").arguments[key] == LARGER[key]
    torch.testing.assert_close(outputs(large), outputs(small), rtol=1e-4, atol=1e-4)
    small.train(), large.train()
    torch.testing.assert_close(outputs(large, True), outputs(small, True), rtol=1e-4, atol=1e-4)


def test_decoder_layers_are_wider_copies_of_the_named_ones(tmp_path):
    small = small_detector()
    tall = small_detector("--dec_layers 4")
    state = small.state_dict()
    for key in list(state):
        for index, source in enumerate((0, 1, 1, 1)):
            if key.startswith(start := f"transformer.decoder.layers.{source}."):
                state[key.replace(start, f"transformer.decoder.layers.{index}.")] = state[key]
    load_weights(tall, state)
    large = grown(tmp_path, small, decoder_from=[0, 1, 1, 1], dec_layers=4)
    torch.testing.assert_close(outputs(large), outputs(tall), rtol=1e-4, atol=1e-4)


def test_decoder_layers_to_copy_are_spread():
    assert spread_layers(3, 6) == [0, 1, 1, 2, 2, 2]
    assert spread_layers(2, 4) == [0, 1, 1, 1]
    assert spread_layers(1, 2) == [0, 0]
    assert all(spread_layers(count, count) == list(range(count)) for count in (1, 2, 3, 6))


def test_a_first_layer_can_be_copied_further_down(tmp_path):
    large = grown(tmp_path, small_detector(), decoder_from=[0, 0, 1], dec_layers=3)
    assert all(value.isfinite().all() for value in outputs(large))


def test_further_queries_lie_around_the_old_ones(tmp_path):
    small = small_detector()
    anchors = grown(tmp_path, small, num_queries=12).refpoint_embed.weight
    old = small.refpoint_embed.weight
    torch.testing.assert_close(anchors[:5], old)
    distance = (anchors[5:] - old[torch.arange(7) % 5]).abs()
    assert distance.min() > 0
    assert distance.mean() < 1


def test_training_reaches_what_has_grown(tmp_path):
    large = grown(tmp_path, small_detector()).train()
    before = {name: value.clone() for name, value in large.named_parameters()}
    optimizer = torch.optim.SGD(large.parameters(), lr=1)
    for _ in range(2):  # weights behind zeros get their first gradient when those have moved
        optimizer.zero_grad()
        sum(value.square().mean() for value in outputs(large, True) + outputs(large)).backward()
        torch.nn.utils.clip_grad_norm_(large.parameters(), 0.1)
        optimizer.step()
    for name, value in large.named_parameters():
        if value.dim() > 1 and name.startswith("transformer.") and "ref_anchor_head" not in name:
            moved = (value != before[name]).any(dim=1)
            assert moved.float().mean() > 0.4, name  # ReLU leaves some hidden channels silent
    weight = large.transformer.encoder.layers[0].self_attn.in_proj_weight
    assert torch.linalg.matrix_rank(weight[:64]) > 32  # queries have left the span that they came from


@pytest.mark.parametrize(
    "sizes, decoder_from, message",
    [
        ({"hidden_dim": 48}, None, "--hidden_dim 48: expected a multiple of the checkpoint's 32"),
        ({"num_queries": 4}, None, "--num_queries 4: the checkpoint has 5, expected at least as many"),
        ({}, [1, 0], "expected 2 numbers from 0 to 1, the first of them 0"),
        ({}, [0, 2], "expected 2 numbers from 0 to 1, the first of them 0"),
        ({}, [0], "expected 2 numbers from 0 to 1, the first of them 0"),
    ],
)
def test_sizes_that_it_cannot_grow_to_are_refused(tmp_path, sizes, decoder_from, message):
    with pytest.raises(UserError, match=message):
        grown(tmp_path, small_detector(), decoder_from=decoder_from, **sizes)
    assert not (tmp_path / "grown.pth").exists()


def test_a_slim_detector_is_refused(tmp_path):
    cfgs = Widths.parse([[[16, 32]], [[32, 32, 32], [32, 32, 32]]])
    path = write(tmp_path / "slim.pth", tiny_detector(cfgs=cfgs)[0])
    with pytest.raises(UserError, match=r"slim\.pth: found no dense dn_dab_detr"):
        grow(path, tmp_path / "grown.pth", LARGER, None, 0.5, 0)
