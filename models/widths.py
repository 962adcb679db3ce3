"""How many channels each attention and FFN of a detector has, and the `--cfgs` grammar that says so."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from util.errors import UserError, one_line, reason_of, shorten

ENCODER_BLOCKS = ("attention", "ffn")
DECODER_BLOCKS = ("self_attention", "cross_attention", "ffn")
LARGEST_FILE = 1 << 20  # bytes
GRAMMAR = "[[[attention, ffn], ...], [[self_attention, cross_attention, ffn], ...]]"


@dataclass(frozen=True)
class Widths:
    """Channel counts by layer.

    Attributes:
        encoder: (attention, ffn) of each layer.
        decoder: (self_attention, cross_attention, ffn) of each layer.
    """

    encoder: tuple[tuple[int, ...], ...]
    decoder: tuple[tuple[int, ...], ...]

    @classmethod
    def dense(cls, enc_layers: int, dec_layers: int, hidden_dim: int, dim_feedforward: int) -> Widths:
        """The widths of an unpruned detector."""
        return cls(
            ((hidden_dim, dim_feedforward),) * enc_layers, ((hidden_dim, hidden_dim, dim_feedforward),) * dec_layers
        )

    @classmethod
    def parse(cls, given: Widths | str | Sequence) -> Widths:
        """Read the `--cfgs` grammar from a nested list, its JSON, its words as a shell split them, or a file's path.

        Widths stay as they are.

        Raises:
            UserError: where it is no JSON or no `[encoder, decoder]` of whole numbers.
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

    def check(self, *, nheads: int, full: Widths) -> None:
        """Raise a `UserError` unless these widths can be cut from a detector with the widths `full`."""
        for stack in ("encoder", "decoder"):
            found, expected = len(getattr(self, stack)), len(getattr(full, stack))
            if found != expected:
                raise UserError(f"--cfgs: found {found} {stack} layers, expected {expected} (--{stack[:3]}_layers)")
        for name in self.names():
            width, limit = self.of(name), full.of(name)
            if not 1 <= width <= limit:
                raise UserError(f"--cfgs: found width {width} for {name}, expected 1 to {limit}")
            if not name.endswith("ffn") and width % nheads:
                raise UserError(f"--cfgs: found width {width} for {name}, expected a multiple of --nheads {nheads}")

    def names(self) -> tuple[str, ...]:
        """Module names in network order, such as `encoder.0.attention`."""
        return tuple(name for name, _ in self.items())

    def items(self) -> Iterator[tuple[str, int]]:
        """Pairs of module name and width in network order."""
        for stack, blocks in (("encoder", ENCODER_BLOCKS), ("decoder", DECODER_BLOCKS)):
            for index, layer in enumerate(getattr(self, stack)):
                for block, width in zip(blocks, layer, strict=True):
                    yield f"{stack}.{index}.{block}", width

    def of(self, module_name: str) -> int:
        """The width of one module."""
        stack, index, position = _locate(module_name)
        return getattr(self, stack)[index][position]

    def replace(self, module_name: str, width: int) -> Widths:
        """A copy in which one module has another width."""
        stack, index, position = _locate(module_name)
        layers = [list(layer) for layer in getattr(self, stack)]
        layers[index][position] = width
        return replace(self, **{stack: tuple(map(tuple, layers))})

    def to_list(self) -> list:
        """The nested list of the `--cfgs` grammar."""
        return [[list(layer) for layer in stack] for stack in (self.encoder, self.decoder)]

    def __str__(self) -> str:
        return json.dumps(self.to_list(), separators=(",", ":"))


def _locate(module_name: str) -> tuple[str, int, int]:
    stack, index, block = module_name.split(".")
    return stack, int(index), {"encoder": ENCODER_BLOCKS, "decoder": DECODER_BLOCKS}[stack].index(block)


def _read_file(path: str) -> bytes:
    """The content of a file of widths: JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark."""
    try:
        with Path(os.path.expanduser(path)).open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ValueError
        return content
    except (OSError, ValueError):
        raise UserError(
            f"--cfgs: found {shorten(path, 80)}, expected {GRAMMAR} or the path of a file that holds it"
        ) from None


def _stacks(nested: object, shown: str) -> list[tuple[tuple[int, ...], ...]]:
    if not (isinstance(nested, list | tuple) and len(nested) == 2):
        raise UserError(f"{shown}: expected two lists, [encoder, decoder], as {GRAMMAR}")
    stacks = []
    for stack, blocks, layers in zip(("encoder", "decoder"), (ENCODER_BLOCKS, DECODER_BLOCKS), nested, strict=True):
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
    return stacks
