"""Grow a small dense detector to full size while preserving its function (Net2Net, arXiv 1511.05641).

    python -m bench.full_size --checkpoint checkpoints/demo.pth --output grown.pth

Training a transformer of 6 + 6 layers and 256 / 2048 channels from scratch takes too long on two CPU cores; fine-tuning
a grown one does not. Wider channels, wider FFNs and more encoder layers preserve the outputs. More decoder layers and
queries do not, because every decoder layer moves the anchors and every query may detect.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models import build
from models.config import DetectorConfig
from util.checkpoint import load_weights
from util.cli import parse, real, user_path, whole
from util.errors import UserError, run_cli
from util.logging import table
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint, save_checkpoint
from weights.strip_optimizer import LOCAL_ARGUMENTS

SIZES = ("hidden_dim", "dim_feedforward", "enc_layers", "dec_layers", "num_queries")
SPREAD = 0.25  # standard deviation of the random shares by which the copies of a channel split its weight
# The input projections of a decoder layer's attentions, and their roles.
DECODER_PROJECTIONS = {
    "self_attn": {
        "sa_qcontent_proj": "query", "sa_qpos_proj": "query", "sa_kcontent_proj": "key", "sa_kpos_proj": "key",
        "sa_v_proj": "value",
    },
    "cross_attn": {
        "ca_qcontent_proj": "query", "ca_qpos_proj": "query", "ca_qpos_sine_proj": "query", "ca_kcontent_proj": "key",
        "ca_kpos_proj": "key", "ca_v_proj": "value",
    },
}  # fmt: skip
READING_SINES = ("ca_qpos_sine_proj", "ca_kpos_proj")

State = dict[str, Tensor]
Columns = Callable[[Tensor], Tensor]


class Widening:
    """Maps `old` channels to `new` ones, a multiple, and widens weights accordingly.

    Channels are pairs, sine and cosine of one frequency. A pair at 2k moves to 2 * factor * k, where the wider encoding
    has the same frequency, followed by its copies. So content and position still match where they are added, and a
    LayerNorm sees every channel equally often.
    """

    def __init__(self, old: int, new: int, generator: torch.Generator) -> None:
        self.factor = new // old
        self.hidden = new
        self.generator = generator

    def _places(self, channels: int) -> Tensor:
        """Return for each channel its new index and those of its copies (channels x factor)."""
        channel, copy = torch.arange(channels)[:, None], torch.arange(self.factor)
        return 2 * self.factor * (channel // 2) + channel % 2 + 2 * copy

    def repeat(self, weight: Tensor) -> Tensor:
        """Copy along the first axis, for weights that add to or scale the residual stream."""
        wide = weight.new_empty(self.factor * len(weight), *weight.shape[1:])
        for place in self._places(len(weight)).unbind(1):
            wide[place] = weight
        return wide

    def split(self, weight: Tensor) -> Tensor:
        """Split columns (rows x channels) over equal copies of an input, unequally so that training separates them."""
        shares = self._normal(self.factor, *weight.shape) * SPREAD
        shares += 1 / self.factor - shares.mean(0)
        wide = weight.new_empty(len(weight), self.factor * weight.shape[1])
        for share, place in zip(shares, self._places(weight.shape[1]).unbind(1), strict=True):
            wide[:, place] = weight * share
        return wide

    def place(self, weight: Tensor) -> Tensor:
        """Widen the columns for an input that contains a position; its new frequencies get zero weights."""
        wide = weight.new_zeros(len(weight), self.factor * weight.shape[1])
        wide[:, self._places(weight.shape[1])[:, 0]] = weight
        return wide

    def more_rows(self, weight: Tensor, rows: int) -> Tensor:
        """Append random rows of the same standard deviation."""
        return torch.cat((weight, self._normal(rows - len(weight), weight.shape[1]) * weight.std()))

    def rotations(self, nheads: int) -> Tensor:
        """Draw a random orthogonal matrix for each head (nheads x head width x head width)."""
        width = self.hidden // nheads
        return torch.linalg.qr(self._normal(nheads, width, width))[0]

    def rows_of_heads(self, weight: Tensor, bias: Tensor, rotations: Tensor, role: str) -> tuple[Tensor, Tensor]:
        """Widen a projection to wider heads: append rows, then rotate each head so that no channel is trivial.

        Args:
            weight: (nheads * old head width) x inputs.
            bias: nheads * old head width.
            rotations: from `rotations`, the same for projections that are multiplied with each other.
            role: `query` gets zero rows, so that the random rows of a `key` or `value` have no effect.
        """
        nheads, width = rotations.shape[:2]
        heads, biases = weight.unflatten(0, (nheads, -1)), bias.unflatten(0, (nheads, -1))
        more = width - heads.shape[1]
        further = torch.zeros(nheads, more, weight.shape[1])
        if role == "query":
            scale = (width / heads.shape[1]) ** 0.5  # the softmax divides by the root of the head width
            heads, biases = heads * scale, biases * scale
        else:
            further = self._normal(*further.shape) * weight.std()
        heads = torch.cat((heads, further), dim=1)
        biases = torch.cat((biases, torch.zeros(nheads, more)), dim=1)
        return (rotations @ heads).flatten(0, 1), (rotations @ biases[..., None]).flatten()

    def columns_of_heads(self, weight: Tensor, rotations: Tensor) -> Tensor:
        """Widen the columns of the projection after the heads; they ignore the new channels of the values."""
        heads = weight.unflatten(1, (len(rotations), -1))
        heads = pad_columns(heads, rotations.shape[1])
        return torch.einsum("onj,nij->oni", heads, rotations).flatten(1)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def pad_columns(weight: Tensor, columns: int) -> Tensor:
    """Pad the last axis with zeros to `columns`."""
    return torch.nn.functional.pad(weight, (0, columns - weight.shape[-1]))


class Growth:
    """Grows the state dict of a `dn_dab_detr`.

    Args:
        state: weights of the small detector.
        source, target: options of the small detector and of the one to grow.
        decoder_from: for each decoder layer of the target, the layer of the small detector to copy.
        jitter: standard deviation of the anchors of new queries around existing ones, in logits.
    """

    def __init__(
        self,
        state: State,
        source: DetectorConfig,
        target: DetectorConfig,
        decoder_from: Sequence[int],
        jitter: float,
        seed: int,
    ) -> None:
        self.state, self.source, self.target = state, source, target
        self.decoder_from, self.jitter = decoder_from, jitter
        self.generator = torch.Generator().manual_seed(seed)
        self.wide = Widening(source.hidden_dim, target.hidden_dim, self.generator)
        self.grown: State = {}

    def run(self) -> State:
        """Return the state dict of the target, without the second name of the box head."""
        wide = self.wide
        self.grown = {key: value for key, value in self.state.items() if key.startswith("backbone.")}
        for index in range(self.target.enc_layers):
            self._encoder_layer(index)
        for index in range(self.target.dec_layers):
            self._decoder_layer(index)
        self._mlp("transformer.encoder.query_scale", wide.split, wide.repeat)
        decoder = "transformer.decoder"
        self._norm(f"{decoder}.norm", f"{decoder}.norm")
        self._mlp(f"{decoder}.query_scale", wide.split, wide.repeat)
        self._mlp(f"{decoder}.ref_point_head", wide.place, wide.repeat)
        self._mlp(f"{decoder}.ref_anchor_head", wide.split)
        self._mlp("bbox_embed", wide.split)
        self.grown["class_embed.weight"] = wide.split(self.state["class_embed.weight"])
        self.grown["class_embed.bias"] = self.state["class_embed.bias"]
        for name in ("input_proj.weight", "input_proj.bias"):
            self.grown[name] = wide.repeat(self.state[name])
        self._queries()
        return self.grown

    def _queries(self) -> None:
        """Widen the contents of the queries, whose last channel is the indicator, and their anchors."""
        labels = self.state["label_enc.weight"]
        indicator = labels.new_ones(len(labels), 1)
        indicator[-1] = 0  # the content of the matching queries
        contents = self.wide.repeat(torch.cat((labels, indicator), dim=1).T).T
        self.grown["label_enc.weight"] = contents[:, :-1]
        if self.source.num_patterns:
            name = "transformer.patterns.weight"
            self.grown[name] = self.wide.repeat(self.state[name].T).T
        anchors = self.state["refpoint_embed.weight"]
        further = torch.arange(self.target.num_queries - len(anchors)) % len(anchors)
        noise = torch.randn(len(further), 4, generator=self.generator) * self.jitter
        self.grown["refpoint_embed.weight"] = torch.cat((anchors, anchors[further] + noise))

    def _encoder_layer(self, index: int) -> None:
        """Widen a layer, or add an identity layer after the last one.

        An identity layer adds zeros to an input of mean 0 and variance 1, which its norms preserve. The norm before it
        moves its scale and shift to the identity layer's last norm.
        """
        wide, stack = self.wide, "transformer.encoder.layers"
        sources = [i * self.source.enc_layers // self.target.enc_layers for i in range(self.target.enc_layers)]
        old, new = f"{stack}.{sources[index]}", f"{stack}.{index}"
        keys, values = wide.rotations(self.source.nheads), wide.rotations(self.source.nheads)
        weights = self.state[f"{old}.self_attn.in_proj_weight"].chunk(3)
        biases = self.state[f"{old}.self_attn.in_proj_bias"].chunk(3)
        rows = [
            wide.rows_of_heads(columns(weight), bias, rotations, role)
            for columns, weight, bias, rotations, role in zip(
                (wide.place, wide.place, wide.split), weights, biases, (keys, keys, values), ("query", "key", "value"),
                strict=True,
            )
        ]  # fmt: skip
        self.grown[f"{new}.self_attn.in_proj_weight"] = torch.cat([weight for weight, _ in rows])
        self.grown[f"{new}.self_attn.in_proj_bias"] = torch.cat([bias for _, bias in rows])
        self._output_projection(f"{old}.self_attn.out_proj", f"{new}.self_attn.out_proj", values)
        self._ffn(old, new)
        self._norm(f"{old}.norm1", f"{new}.norm1")
        self._norm(f"{old}.norm2", f"{new}.norm2")
        if index and sources[index] == sources[index - 1]:
            for name in ("self_attn.out_proj", "linear2"):
                self.grown[f"{new}.{name}.weight"].zero_()
                self.grown[f"{new}.{name}.bias"].zero_()
            for norm in (f"{stack}.{index - 1}.norm2", f"{new}.norm1"):
                self.grown[f"{norm}.weight"].fill_(1)
                self.grown[f"{norm}.bias"].zero_()

    def _decoder_layer(self, index: int) -> None:
        """Widen a copy of a layer; only the first layer keeps `ca_qpos_proj`."""
        stack, nheads, wide = "transformer.decoder.layers", self.source.nheads, self.wide
        old, new = f"{stack}.{self.decoder_from[index]}", f"{stack}.{index}"
        for attention, projections in DECODER_PROJECTIONS.items():
            keys, values = wide.rotations(nheads), wide.rotations(nheads)
            for name, role in projections.items():
                if name == "ca_qpos_proj" and index > 0:
                    continue
                columns = wide.place if name in READING_SINES else wide.split
                weight, bias = columns(self.state[f"{old}.{name}.weight"]), self.state[f"{old}.{name}.bias"]
                rotations = values if role == "value" else keys
                weight, bias = wide.rows_of_heads(weight, bias, rotations, role)
                self.grown[f"{new}.{name}.weight"], self.grown[f"{new}.{name}.bias"] = weight, bias
            self._output_projection(f"{old}.{attention}.out_proj", f"{new}.{attention}.out_proj", values)
        self._ffn(old, new)
        for norm in ("norm1", "norm2", "norm3"):
            self._norm(f"{old}.{norm}", f"{new}.{norm}")

    def _output_projection(self, old: str, new: str, rotations: Tensor) -> None:
        weight = self.wide.columns_of_heads(self.state[f"{old}.weight"], rotations)
        self.grown[f"{new}.weight"] = self.wide.repeat(weight)
        self.grown[f"{new}.bias"] = self.wide.repeat(self.state[f"{old}.bias"])

    def _ffn(self, old: str, new: str) -> None:
        """Widen an FFN; new hidden channels have random input weights and zero output weights."""
        hidden = self.target.dim_feedforward
        self.grown[f"{new}.linear1.weight"] = self.wide.more_rows(
            self.wide.split(self.state[f"{old}.linear1.weight"]), hidden
        )
        self.grown[f"{new}.linear1.bias"] = pad_columns(self.state[f"{old}.linear1.bias"], hidden)
        self.grown[f"{new}.linear2.weight"] = self.wide.repeat(pad_columns(self.state[f"{old}.linear2.weight"], hidden))
        self.grown[f"{new}.linear2.bias"] = self.wide.repeat(self.state[f"{old}.linear2.bias"])
        if f"{old}.activation.weight" in self.state:
            self.grown[f"{new}.activation.weight"] = self.state[f"{old}.activation.weight"].clone()

    def _norm(self, old: str, new: str) -> None:
        for name in ("weight", "bias"):
            self.grown[f"{new}.{name}"] = self.wide.repeat(self.state[f"{old}.{name}"])

    def _mlp(self, prefix: str, inputs: Columns, outputs: Columns = torch.clone) -> None:
        """Widen an MLP; new hidden channels have random input weights and zero output weights."""
        count = sum(key.startswith(f"{prefix}.layers.") and key.endswith(".weight") for key in self.state)
        for index in range(count):
            name = f"{prefix}.layers.{index}"
            weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
            weight = inputs(weight) if index == 0 else pad_columns(weight, self.wide.hidden)
            if index < count - 1:
                weight, bias = self.wide.more_rows(weight, self.wide.hidden), pad_columns(bias, self.wide.hidden)
            else:
                weight, bias = outputs(weight), outputs(bias)
            self.grown[f"{name}.weight"], self.grown[f"{name}.bias"] = weight, bias


def spread_layers(old: int, new: int) -> list[int]:
    """Return for each of `new` decoder layers the one of `old` to copy, in order; all but the first equally often."""
    return [0, *(1 + (index * (old - 1) - 1) // (new - 1) for index in range(1, new))]


def grow(checkpoint_path: str | Path, output: Path, sizes: dict[str, int], decoder_from: Sequence[int] | None,
         jitter: float, seed: int) -> list[tuple[str, int, int]]:  # fmt: skip
    """Write the grown detector to `output`.

    Args:
        checkpoint_path: a dense `dn_dab_detr` of ours.
        sizes: a value for each of `SIZES`.
        decoder_from, jitter: see `Growth`; None chooses the layers by `spread_layers`.

    Returns:
        Rows of name, size before, size after.

    Raises:
        UserError: not a dense `dn_dab_detr`, or sizes that it cannot grow to.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    source = options_for(DetectorConfig(), checkpoint)
    if checkpoint.kind != "ours" or source.cfgs is not None or source.modelname != "dn_dab_detr":
        raise UserError(f"{checkpoint_path}: found no dense dn_dab_detr written by main.py, expected one")
    target = dataclasses.replace(source, **sizes, num_select=max(source.num_select, sizes["num_queries"]))
    _check_sizes(source, sizes)
    decoder_from = decoder_from or spread_layers(source.dec_layers, target.dec_layers)
    _check_decoder_layers(decoder_from, source.dec_layers, target.dec_layers)
    small = build_detector(source, checkpoint)[0]
    model = build(target)[0]
    state = {key: value.clone() for key, value in small.state_dict().items()}
    load_weights(model, Growth(state, source, target, decoder_from, jitter, seed).run(), "the grown weights")
    settings = {name: value for name, value in checkpoint.arguments.items() if name not in LOCAL_ARGUMENTS}
    settings |= {**sizes, "num_select": target.num_select}
    save_checkpoint(output, state_dict=model.state_dict(), widths=model.widths, full_widths=model.widths,
                    arguments=settings, num_classes=checkpoint.num_classes)  # fmt: skip
    counts = [sum(p.numel() for p in part.parameters()) for part in (small, model)]
    return [*((name, getattr(source, name), sizes[name]) for name in SIZES), ("parameters", *counts)]


def _check_sizes(source: DetectorConfig, sizes: dict[str, int]) -> None:
    for name in SIZES:
        least = getattr(source, name)
        if sizes[name] < least:
            raise UserError(f"--{name} {sizes[name]}: the checkpoint has {least}, expected at least as many")
    if sizes["hidden_dim"] % source.hidden_dim:
        raise UserError(
            f"--hidden_dim {sizes['hidden_dim']}: expected a multiple of the checkpoint's {source.hidden_dim}"
        )


def _check_decoder_layers(decoder_from: Sequence[int], old: int, new: int) -> None:
    """Check `decoder_from`; its first entry is 0 because only the first layer's cross-attention adds positions."""
    if len(decoder_from) != new or decoder_from[0] != 0 or max(decoder_from) >= old:
        raise UserError(
            f"--decoder_from: found {' '.join(map(str, decoder_from))}, expected {new} numbers from 0 to {old - 1}, "
            "the first of them 0"
        )


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(
        "python -m bench.full_size",
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=user_path, required=True, help="dense dn_dab_detr to grow")
    add("--output", type=user_path, required=True, help="file to write the grown detector to")
    add("--hidden_dim", type=whole(8), default=256, help="channels of the transformer, a multiple of the checkpoint's")
    add("--dim_feedforward", type=whole(1), default=2048, help="hidden channels of an FFN")
    add("--enc_layers", type=whole(1), default=6, help="encoder layers")
    add("--dec_layers", type=whole(1), default=6, help="decoder layers")
    add("--num_queries", type=whole(1), default=300, help="matching queries")
    add(
        "--decoder_from",
        type=whole(0),
        nargs="+",
        help="for each decoder layer the index of the one to copy; None distributes them evenly",
    )
    add("--jitter", type=real(0), default=3, help="standard deviation of new anchors, in logits")
    add("--seed", type=whole(0), default=0, help="random seed")
    return parser


def main() -> None:
    """Run the script."""
    args, _ = parse(get_args_parser())
    sizes = {name: getattr(args, name) for name in SIZES}
    rows = grow(args.checkpoint, args.output, sizes, args.decoder_from, args.jitter, args.seed)
    print(table(["", "before", "after"], rows))
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
