"""Widths (channels) of a detector's attentions, FFNs and residual blocks, and the `--cfgs` grammar."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from util.errors import UserError, one_line, reason_of, shorten

ENCODER_BLOCKS = ("attention", "ffn")
DECODER_BLOCKS = ("self_attention", "cross_attention", "ffn")
BACKBONE = "backbone"
STAGES = ("layer1", "layer2", "layer3", "layer4")
LARGEST_FILE = 1 << 20  # bytes
GRAMMAR = (
    "[[[attention, ffn], ...], [[self_attention, cross_attention, ffn], ...]], or with a third list, [[block, ...], "
    "...], for the backbone's stages"
)


@dataclass(frozen=True)
class Widths:
    """Channel counts by layer; a module of width 0 is removed and adds only a constant.

    Attributes:
        encoder: (attention, ffn) of each layer.
        decoder: (self_attention, cross_attention, ffn) of each layer.
        backbone: inner channels of each residual block by stage; None if all blocks are unpruned.
    """

    encoder: tuple[tuple[int, ...], ...]
    decoder: tuple[tuple[int, ...], ...]
    backbone: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def dense(cls, enc_layers: int, dec_layers: int, hidden_dim: int, dim_feedforward: int) -> Widths:
        """Return the widths of an unpruned detector."""
        return cls(
            ((hidden_dim, dim_feedforward),) * enc_layers, ((hidden_dim, hidden_dim, dim_feedforward),) * dec_layers
        )

    @classmethod
    def parse(cls, given: Widths | str | Sequence) -> Widths:
        """Parse `--cfgs` from a nested list, its JSON, its words as split by a shell, or a file's path.

        `Widths` are returned unchanged.

        Raises:
            UserError: it is not `[encoder, decoder]` or `[encoder, decoder, backbone]` of whole numbers in JSON.
        """
        if isinstance(given, cls):
            return given
        shown = "--cfgs"
        if isinstance(given, list | tuple) and all(isinstance(word, str) for word in given):
            given = " ".join(given)
        if isinstance(given, str):
            content: str | bytes = given
            if not given.lstrip().startswith("["):
                shown, content = f"--cfgs {one_line(given, 200)}", _read_file(given)
            try:
                given = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{shown}: found no JSON ({reason_of(error)}), expected {GRAMMAR}") from None
        return cls(*_stacks(given, shown))

    def check(self, *, nheads: int, full: Widths, blocks: tuple[tuple[int, ...], ...] = ()) -> Widths:
        """Return these widths, without the backbone's list if all its blocks are unpruned.

        Args:
            nheads: attention heads.
            full: widths of the unpruned detector.
            blocks: widths of its residual blocks (`models.residual.block_widths`).

        Raises:
            UserError: such a detector cannot be pruned to them.
        """
        for stack in ("encoder", "decoder"):
            found, expected = len(getattr(self, stack)), len(getattr(full, stack))
            if found != expected:
                raise UserError(f"--cfgs: found {found} {stack} layers, expected {expected} (--{stack[:3]}_layers)")
        self._check_backbone(blocks)
        full = replace(full, backbone=blocks)
        for name, width in self.items():
            limit = full.of(name)
            if not 0 <= width <= limit:
                raise UserError(f"--cfgs: found width {width} for {name}, expected 0 to {limit}")
            if name.endswith("attention") and width % nheads:
                raise UserError(f"--cfgs: found width {width} for {name}, expected a multiple of --nheads {nheads}")
        return replace(self, backbone=None) if self.backbone == blocks else self

    def _check_backbone(self, blocks: tuple[tuple[int, ...], ...]) -> None:
        if self.backbone is None:
            return
        found, expected = len(self.backbone), len(blocks)
        if found != expected:
            raise UserError(
                f"--cfgs: found {found} stages of the backbone, expected {expected}, layer1 to --return_layer"
            )
        for stage, of_stage, of_whole in zip(STAGES, self.backbone, blocks, strict=False):
            if len(of_stage) != len(of_whole):
                raise UserError(
                    f"--cfgs: found {len(of_stage)} blocks in {stage} of the backbone, expected {len(of_whole)}"
                )

    def names(self) -> tuple[str, ...]:
        """Module names in network order, such as `encoder.0.attention`."""
        return tuple(name for name, _ in self.items())

    def items(self) -> Iterator[tuple[str, int]]:
        """Yield module names and widths in network order; backbone blocks only if `backbone` is set."""
        for stage, of_stage in zip(STAGES, self.backbone or (), strict=False):
            for index, width in enumerate(of_stage):
                yield f"{BACKBONE}.{stage}.{index}", width
        for stack, blocks in (("encoder", ENCODER_BLOCKS), ("decoder", DECODER_BLOCKS)):
            for index, layer in enumerate(getattr(self, stack)):
                for block, width in zip(blocks, layer, strict=True):
                    yield f"{stack}.{index}.{block}", width

    def of(self, module_name: str) -> int:
        """Return the width of a module.

        Raises:
            ValueError: there is no such module, or it is a backbone's block and `backbone` is None.
        """
        stack, index, position = self._locate(module_name)
        return getattr(self, stack)[index][position]

    def replace(self, module_name: str, width: int) -> Widths:
        """Return a copy with another width of a module; errors as for `of`."""
        stack, index, position = self._locate(module_name)
        layers = [list(layer) for layer in getattr(self, stack)]
        layers[index][position] = width
        return replace(self, **{stack: tuple(map(tuple, layers))})

    def first_layers(self, count: int) -> Widths:
        """Return a copy with the first `count` decoder layers only."""
        return replace(self, decoder=self.decoder[:count])

    def padded_to(self, whole: Widths) -> Widths:
        """Return a copy with width 0 in the decoder layers that only `whole` has, for tables and plots."""
        dropped = whole.decoder[len(self.decoder) :]
        return replace(self, decoder=(*self.decoder, *((0,) * len(layer) for layer in dropped)))

    def _locate(self, module_name: str) -> tuple[str, int, int]:
        """Return the stack of a module, its layer's index and its own index in the layer."""
        if module_name not in self.names():
            needed = ", expected a third list, with the backbone's" if module_name.startswith(f"{BACKBONE}.") else ""
            raise ValueError(f"found no width of {shorten(module_name, 80)} in {one_line(str(self), 200)}{needed}")
        stack, index, block = module_name.split(".")
        if stack == BACKBONE:
            return stack, STAGES.index(index), int(block)
        return stack, int(index), {"encoder": ENCODER_BLOCKS, "decoder": DECODER_BLOCKS}[stack].index(block)

    def to_list(self) -> list:
        """Return the nested list of the `--cfgs` grammar: two lists, or three if `backbone` is set."""
        stacks = (self.encoder, self.decoder, *([] if self.backbone is None else [self.backbone]))
        return [[list(layer) for layer in stack] for stack in stacks]

    def __str__(self) -> str:
        return json.dumps(self.to_list(), separators=(",", ":"))


def _read_file(path: str) -> bytes:
    """Read a file of widths: JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark."""
    try:
        with Path(os.path.expanduser(path)).open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ValueError
        return content
    except (OSError, ValueError):
        raise UserError(
            f"--cfgs: found {shorten(path, 80)}, expected {GRAMMAR} or the path of a file with it"
        ) from None


def _stacks(nested: object, shown: str) -> list[tuple[tuple[int, ...], ...]]:
    if not (isinstance(nested, list | tuple) and len(nested) in (2, 3)):
        raise UserError(f"{shown}: expected two or three lists, {GRAMMAR}")
    stacks = []
    for stack, blocks, layers in zip(("encoder", "decoder"), (ENCODER_BLOCKS, DECODER_BLOCKS), nested, strict=False):
        if not isinstance(layers, list | tuple):
            raise UserError(f"{shown}: found {shorten(layers)} for the {stack}, expected a list of layers, {GRAMMAR}")
        for index, layer in enumerate(layers):
            if not (isinstance(layer, list | tuple) and len(layer) == len(blocks)):
                raise UserError(
                    f"{shown}: found {shorten(layer)} for {stack} layer {index}, expected [{', '.join(blocks)}]"
                )
            if not all(type(width) is int for width in layer):
                raise UserError(f"{shown}: found {shorten(layer)} for {stack} layer {index}, expected whole numbers")
        stacks.append(tuple(tuple(layer) for layer in layers))
    return [*stacks, *(_stages(stages, shown) for stages in nested[2:])]


def _stages(stages: object, shown: str) -> tuple[tuple[int, ...], ...]:
    expected = "expected a list of stages, each a list with the width of each block"
    if not isinstance(stages, list | tuple):
        raise UserError(f"{shown}: found {shorten(stages)} for the {BACKBONE}, {expected}")
    for index, widths in enumerate(stages, 1):
        if not isinstance(widths, list | tuple) or not all(type(width) is int for width in widths):
            raise UserError(f"{shown}: found {shorten(widths)} for layer{index} of the {BACKBONE}, {expected}")
    return tuple(tuple(widths) for widths in stages)
