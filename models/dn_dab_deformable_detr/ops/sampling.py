"""Weighted sums of bilinear samples, by the compiled operator if it is installed, else in plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

MODULE = "deformable_sampling"
OPERATOR = "dn_detr::sample"

# Device types for which the compiled operator has a kernel; None before `load_operator`.
_compiled_for: frozenset[str] | None = None

# Takes the arguments of `sample`.
Sampling = Callable[[Tensor, list[int], Tensor, Tensor], Tensor]


def sample(value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sum the weighted bilinear samples over levels and points (arXiv 2010.04159, equation 3, inner sums).

    Args:
        value: B x S x heads x channels of any floating point type, the pixels of all levels, level after level.
        level_sizes: [h0, w0, h1, w1, ...], in all S pixels.
        locations: B x Q x heads x levels x points x 2, (x, y) in [0, 1] of a level's map, on which pixel (i, j) has its
            centre at ((j + 0.5) / w, (i + 0.5) / h). Values outside of the map are 0. Infinite and NaN locations are
            outside, but plain PyTorch on the CPU gives NaN for them.
        weights: B x Q x heads x levels x points. Like `locations`, float64 for float64 values, else float32.

    Returns:
        B x Q x heads x channels, of the values' type; sums are computed in the type of the weights.

    Raises:
        RuntimeError: the arguments are inconsistent.
    """
    compiled_for = load_operator() if _compiled_for is None else _compiled_for
    if value.device.type in compiled_for:
        return torch.ops.dn_detr.sample(value, level_sizes, locations, weights)
    check_arguments(value, level_sizes, locations, weights)
    return _in_pytorch(value, level_sizes, locations, weights)


@contextlib.contextmanager
def without_operator(sampling: Sampling | None = None) -> Iterator[None]:
    """Make `sample` use plain PyTorch inside the context, so that traced models do not need the compiled operator.

    Args:
        sampling: `sample_in_pytorch` or `sample_by_gather`; None for the first.
    """
    global _compiled_for, _in_pytorch
    before = _compiled_for, _in_pytorch
    _compiled_for, _in_pytorch = frozenset(), sampling or sample_in_pytorch
    try:
        yield
    finally:
        _compiled_for, _in_pytorch = before


def sample_in_pytorch(value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute `sample` in plain PyTorch, the reference for the compiled operator."""
    batch, _, heads, channels = value.shape
    sizes_hw = list(zip(level_sizes[::2], level_sizes[1::2], strict=True))
    dtype = locations.dtype
    grids = 2 * locations - 1
    samples = []
    for level, pixels in enumerate(value.split([height * width for height, width in sizes_hw], dim=1)):
        image = pixels.permute(0, 2, 3, 1).reshape(batch * heads, channels, *sizes_hw[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image.to(dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2).unsqueeze(1)
    summed = (torch.cat(samples, dim=-1) * weights).sum(-1)
    return summed.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).to(value.dtype)


def sample_by_gather(value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute `sample` by reading the four pixels around each point, for runtimes that are wrong at `grid_sample`."""
    batch, _, heads, _ = value.shape
    points = locations.shape[1]
    pixels = value.transpose(1, 2).flatten(0, 2)  # row ((image * heads) + head) * S + pixel
    first_rows = torch.arange(batch * heads, device=value.device).unflatten(0, (batch, heads)) * value.shape[1]
    first_rows = first_rows[:, None, :, None]
    right, below = (
        torch.tensor(corner, dtype=locations.dtype, device=value.device) for corner in ((0, 1, 0, 1), (0, 0, 1, 1))
    )
    summed = []
    for level, (height, width) in enumerate(zip(level_sizes[::2], level_sizes[1::2], strict=True)):
        x, y = (locations[:, :, :, level, :, axis, None] * side - 0.5 for axis, side in enumerate((width, height)))
        column, row = x.floor() + right, y.floor() + below
        share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * weights[:, :, :, level, :, None]
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        index = torch.where(inside, row * width + column, 0).long().flatten(-2) + first_rows
        found = pixels[index.flatten()].to(share.dtype).unflatten(0, (batch, points, heads, -1))
        summed.append((torch.where(inside, share, 0).flatten(-2).unsqueeze(-2) @ found).squeeze(-2))
        first_rows = first_rows + height * width
    return sum(summed[1:], start=summed[0]).to(value.dtype)


# What `sample` runs where there is no compiled operator.
_in_pytorch: Sampling = sample_in_pytorch


def check_arguments(value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor) -> None:
    """Raise a `RuntimeError` if the arguments of `sample` are inconsistent, as the compiled operator does."""
    torch._check(value.dim() == 4, lambda: f"sample: value has {value.dim()} axes, expected 4")
    torch._check(locations.dim() == 6, lambda: f"sample: locations has {locations.dim()} axes, expected 6")
    torch._check(
        len(level_sizes) > 0 and len(level_sizes) % 2 == 0,
        lambda: f"sample: level_sizes has {len(level_sizes)} entries, expected height and width of each level",
    )
    for side in level_sizes:
        _check_side(side)
    pixels = sum(h * w for h, w in zip(level_sizes[::2], level_sizes[1::2], strict=True))
    torch._check(
        pixels == value.shape[1], lambda: f"sample: the levels have {pixels} pixels, and value has {value.shape[1]}"
    )
    torch._check(value.is_floating_point(), lambda: f"sample: value is {value.dtype}, expected a floating type")
    wide = torch.promote_types(value.dtype, torch.float32)
    shape = (value.shape[0], locations.shape[1], value.shape[2], len(level_sizes) // 2, locations.shape[4])
    for name, tensor, expected in (("locations", locations, (*shape, 2)), ("weights", weights, shape)):
        _check_companion(name, tensor, expected, wide, value)


def _check_side(side: int) -> None:
    torch._check(side >= 1, lambda: f"sample: a level has a side of {side}, expected at least 1")


def _check_companion(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, value: Tensor) -> None:
    torch._check(
        tuple(tensor.shape) == shape,
        lambda: f"sample: {name} has the shape {tuple(tensor.shape)}, expected {shape}",
    )
    torch._check(tensor.dtype == dtype, lambda: f"sample: {name} is {tensor.dtype}, expected {dtype}")
    torch._check(
        tensor.device == value.device,
        lambda: f"sample: {name} is on {tensor.device}, and value on {value.device}",
    )


def load_operator() -> frozenset[str]:
    """Load the compiled operator once; return the device types that it supports, and warn about missing ones."""
    global _compiled_for
    if _compiled_for is not None:
        return _compiled_for
    expected = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    reason, found = "it was built without CUDA", frozenset[str]()
    try:
        importlib.import_module(MODULE)
    except ImportError as error:  # not built, or built for another PyTorch
        reason = str(error)
    else:
        if has_kernel(OPERATOR, "Autograd"):
            _register()
            found = frozenset(type_ for type_ in ("cpu", "cuda") if has_kernel(OPERATOR, type_.upper()))
        else:
            reason = "it was built from older sources, without gradients"
    _compiled_for = found
    if expected - found:
        warnings.warn(
            f"no compiled sampling for {', '.join(sorted(expected - found))} ({reason}): plain PyTorch is used, which "
            "is several times slower; build the operator with models/dn_dab_deformable_detr/ops/setup.py",
            stacklevel=2,
        )
    return found


@functools.cache
def _register() -> None:
    """Register the output shapes of the compiled operator, for compilers and exporters."""

    @torch.library.register_fake(OPERATOR)
    def _(value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
        check_arguments(value, level_sizes, locations, weights)
        return value.new_empty(value.shape[0], locations.shape[1], *value.shape[2:])

    @torch.library.register_fake(f"{OPERATOR}_backward")
    def _(
        gradient: Tensor, value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, locations, weights = (tensor.new_empty(tensor.shape) for tensor in (value, locations, weights))
        return value, locations, weights
