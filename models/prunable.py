"""Records of the attentions, FFNs and residual blocks of a detector that can be pruned, by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.layers import GatedModule
from models.residual import BLOCK, ResidualBlock

KINDS = {
    "attention": "encoder_attention",
    "self_attention": "self_attention",
    "cross_attention": "cross_attention",
    "ffn": "ffn",
}
SCOPES = ("transformer", "detector")
PARTS = ("query", "value", "hidden", "inner", "inner1", "inner2")


@dataclass(frozen=True)
class ParameterSlice:
    """How a parameter shrinks with its module.

    Attributes:
        key: full key in the detector's state dict.
        axis: axis along which kept channels are selected: 0 for a projection's rows or a convolution's outputs, 1 for
        columns or inputs.
        parts: content of each block along the axis: ("query",), ("hidden",), or ("query", "key", "value") for a packed
        projection. If content and position are multiplied apart, "query" and "key" belong to the content,
        "position_query" and "position_key" to the position, and a projection for keys of both is a "common_key".
        A residual block has "inner", or "inner1" and "inner2".
        fold: for each block, whether it has the softmax scale and is multiplied by sqrt(kept / full head width).
    """

    key: str
    axis: int
    parts: tuple[str, ...]
    fold: tuple[bool, ...] = (False,)

    def blocks(self, parameter: Tensor) -> list[tuple[str, Tensor]]:
        """Return each part with its block of `parameter`, a view."""
        return list(zip(self.parts, parameter.chunk(len(self.parts), self.axis), strict=True))


@dataclass(frozen=True)
class PrunableModule:
    """An attention, FFN or residual block.

    Attributes:
        name: such as `decoder.1.cross_attention`.
        kind: `encoder_attention`, `self_attention`, `cross_attention`, `ffn` or `residual_block`.
        width: current number of channels.
        nheads: groups of equal width; 1 for an FFN and a residual block.
        layer: module with its gates.
        slices: parameters that shrink with it.
        other_keys: keys of its parameters and buffers that do not shrink, but that no channel uses at width 0; only the
            bias after the (last) channels is left then.
    """

    name: str
    kind: str
    width: int
    nheads: int
    layer: GatedModule
    slices: tuple[ParameterSlice, ...]
    other_keys: tuple[str, ...] = ()

    @property
    def is_attention(self) -> bool:
        """True for an attention, False for an FFN and a residual block."""
        return self.kind not in ("ffn", BLOCK)

    @property
    def block(self) -> str:
        """Its name within its layer, for `gates` and the observer."""
        return BLOCK if self.kind == BLOCK else self.name.rsplit(".", 1)[1]

    @property
    def has_logits(self) -> bool:
        """True if queries are multiplied with keys, so not for a deformable attention."""
        return any("query" in piece.parts for piece in self.slices)

    @property
    def has_common_key(self) -> bool:
        """True if content and position keys share a projection."""
        return any("common_key" in piece.parts for piece in self.slices)

    @property
    def output_name(self) -> str:
        """Name in the detector of the linear layer or convolution after the (last) channels."""
        return [piece.key for piece in self.slices if piece.axis == 1][-1].removesuffix(".weight")

    @property
    def bias_name(self) -> str:
        """Name in the detector of the layer whose bias is left at width 0: the output layer, or a block's last norm."""
        if self.kind != BLOCK:
            return self.output_name
        return f"{self.output_name.rpartition('.')[0]}.bn{len(self.parts) + 1}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the channel sets, such as query and value; only value for a deformable attention."""
        cut = {part for piece in self.slices for part in piece.parts}
        return tuple(part for part in PARTS if part in cut)

    def set_gate(self, first: Tensor | None, second: Tensor | None = None) -> None:
        """Multiply the module's `parts` by gates of shape `width` or B x 1 x width; None removes a gate."""
        self.layer.gates[self.block] = (first, second)

    def parameter_slices(self) -> tuple[ParameterSlice, ...]:
        """Return the parameters that shrink with the module, and how."""
        return self.slices


def rows_and_bias(prefix: str, part: str, fold: bool = False) -> list[ParameterSlice]:
    """Return the slices of a linear layer whose outputs are cut."""
    return [ParameterSlice(f"{prefix}.{leaf}", 0, (part,), (fold,)) for leaf in ("weight", "bias")]


def columns(prefix: str, part: str) -> ParameterSlice:
    """Return the slice of a linear layer whose inputs are cut."""
    return ParameterSlice(f"{prefix}.weight", 1, (part,))


def ffn_slices(prefix: str) -> tuple[ParameterSlice, ...]:
    """Return the slices of the FFN of the layer at `prefix`."""
    return (*rows_and_bias(f"{prefix}.linear1", "hidden"), columns(f"{prefix}.linear2", "hidden"))


def packed_attention_slices(prefix: str) -> tuple[ParameterSlice, ...]:
    """Return the slices of an attention at `prefix` with in_proj_weight (queries, keys, values) and out_proj."""
    packed = (("query", "key", "value"), (True, False, False))
    return (
        ParameterSlice(f"{prefix}.in_proj_weight", 0, *packed),
        ParameterSlice(f"{prefix}.in_proj_bias", 0, *packed),
        columns(f"{prefix}.out_proj", "value"),
    )


def residual_block_module(name: str, layer: ResidualBlock) -> PrunableModule:
    """Return the record of the residual block `backbone.STAGE.INDEX`; batch norms are cut with their convolution."""
    prefix = f"backbone.0.body.{name.partition('.')[2]}"
    slices: list[ParameterSlice] = []
    for number, part in enumerate(layer.parts, 1):
        norm = [f"bn{number}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        slices += [ParameterSlice(f"{prefix}.{leaf}", 0, (part,)) for leaf in (f"conv{number}.weight", *norm)]
        slices.append(columns(f"{prefix}.conv{number + 1}", part))
    last = f"bn{len(layer.parts) + 1}"
    other_keys = [f"{prefix}.{last}.{leaf}" for leaf in ("weight", "running_mean", "running_var")]
    other_keys += [
        f"{prefix}.{key}"
        for key, _ in layer.named_buffers()
        if key.endswith("num_batches_tracked") and not key.startswith("downsample.")
    ]
    return PrunableModule(name, BLOCK, layer.width, 1, layer, tuple(slices), tuple(other_keys))
