"""Check the installed operator against plain PyTorch: `python test.py`.

Every line ends with True or False; the exit code is 1 if one is False. All checks also run on CUDA if available.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from models.dn_dab_deformable_detr.ops import sample_in_pytorch
from models.dn_dab_deformable_detr.ops.sampling import load_operator

GRADIENT_CHANNELS = (30, 32, 64, 71, 19, 7, 1)  # per head; pruning gives odd numbers
SIZES = [6, 4, 3, 2]
PIXEL_SIZES = [1, 1, 1, 5, 4, 1]
EXACT_SIZES = [4, 8, 2, 4, 1, 2]  # powers of 2, so that locations scale to the map without rounding
INFINITY, NAN = float("inf"), float("nan")
# Maximum difference from the result in double, relative to the largest number.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

Arguments = tuple[Tensor, list[int], Tensor, Tensor]


def arguments(
    channels: int,
    dtype: torch.dtype,
    device: str,
    *,
    sizes: list[int] = SIZES,
    batch: int = 2,
    queries: int = 3,
    heads: int = 2,
    points: int = 2,
) -> Arguments:
    """Return random arguments of `sample`, with many points outside of the map and none where the derivative jumps."""
    generator = torch.Generator().manual_seed(channels)
    levels = len(sizes) // 2
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pixels = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    sizes_wh = torch.tensor(sizes, dtype=torch.float64).view(levels, 2).flip(-1)[:, None]
    value = 2 * torch.rand(batch, pixels, heads, channels, generator=generator) - 1
    locations = 1.6 * torch.rand(batch, queries, heads, levels, points, 2, generator=generator).double() - 0.3
    # Avoid pixel centres, where the bilinear surface has kinks that break finite differences.
    grid = locations * sizes_wh - 0.5
    part = (grid - grid.floor()).clamp(0.05, 0.95)
    locations = (grid.floor() + part + 0.5) / sizes_wh
    weights = torch.rand(batch, queries, heads, levels, points, generator=generator)
    return value.to(device, dtype), sizes, locations.to(device, wide), weights.to(device, wide)


def outcome(function: Callable, given: Arguments) -> list[Tensor]:
    """Return the result and gradients of `function`, converted to double."""
    value, sizes, locations, weights = given
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (value, locations, weights)]
    out = function(inputs[0], sizes, inputs[1], inputs[2])
    slope = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    found = [out, *torch.autograd.grad(out, inputs, slope)] if out.requires_grad else [out]
    return [tensor.detach().double() for tensor in found]


def agrees(given: Arguments) -> bool:
    """Return whether the operator agrees with plain PyTorch in double in result and gradients."""
    found = outcome(torch.ops.dn_detr.sample, given)
    value, sizes, locations, weights = given
    expected = outcome(sample_in_pytorch, (value.double(), sizes, locations.double(), weights.double()))
    tolerance = TOLERANCE[value.dtype]
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return False
    return all(
        bool(((a - b).abs() <= tolerance * max(1.0, float(b.abs().max()) if b.numel() else 1.0)).all())
        for a, b in zip(found, expected, strict=True)
    )


def agrees_on(channels: int, dtype: torch.dtype, device: str, points: int = 2) -> bool:
    """Return whether they agree on random arguments."""
    return agrees(arguments(channels, dtype, device, points=points))


def gradients_are_right(channels: int, device: str) -> bool:
    """Compare gradients in double with finite differences."""
    value, sizes, locations, weights = arguments(channels, torch.float64, device, batch=1, queries=2)
    inputs = tuple(tensor.requires_grad_() for tensor in (value, locations, weights))
    call = lambda v, x, w: torch.ops.dn_detr.sample(v, sizes, x, w)  # noqa: E731
    return torch.autograd.gradcheck(call, inputs, raise_exception=False, nondet_tol=1e-9 if device != "cpu" else 0.0)


def strided(given: Arguments) -> Arguments:
    """Return the same numbers in tensors that are not contiguous."""
    value, sizes, locations, weights = given
    swapped = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (value, locations, weights)]
    return swapped[0], sizes, swapped[1], swapped[2]


def outside(given: Arguments) -> Arguments:
    """Return the same arguments with all points outside of the map, some infinite, some NaN."""
    value, sizes, locations, weights = given
    places = torch.tensor([-3.0, 7.0, float("inf"), float("nan"), 1e30]).to(locations)
    return value, sizes, places.repeat(locations.numel())[: locations.numel()].view(locations.shape), weights


def is_zero(given: Arguments) -> bool:
    """Return whether the result and all gradients are 0."""
    return all(not tensor.any() for tensor in outcome(torch.ops.dn_detr.sample, given))


def exact_arguments(
    channels: int, dtype: torch.dtype, device: str, *, values: tuple[float, ...] = (), attention: tuple[float, ...]
) -> Arguments:
    """Return arguments with points on and between pixel centres, on the map's edges, and where samples become 0.

    One pixel in eight has one of `values`, such as infinity; every weight is one of `attention`.
    """
    generator = torch.Generator().manual_seed(channels)
    value, sizes, locations, weights = arguments(channels, dtype, "cpu", sizes=EXACT_SIZES, points=9)
    sizes_wh = torch.tensor(sizes).view(-1, 2).flip(-1)[:, None]
    if values:
        chosen = torch.tensor(values)[torch.randint(len(values), value.shape, generator=generator)]
        value = torch.where(torch.rand(*value.shape[:3], 1, generator=generator) < 0.125, chosen.to(value), value)
    quarters = torch.randint(-5, 4 * 8 + 2, locations.shape, generator=generator) / 4
    locations = (quarters.minimum(sizes_wh + 0.25) + 0.5) / sizes_wh
    weights = torch.tensor(attention)[torch.randint(len(attention), weights.shape, generator=generator)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return value.to(device), sizes, locations.to(device, wide), weights.to(device, wide)


def same_numbers(given: Arguments, parts: int = 4) -> bool:
    """Return whether the first `parts` of result and gradients match plain PyTorch on the CPU, infinity and NaN too."""
    found = outcome(torch.ops.dn_detr.sample, given)
    on_cpu = (given[0].cpu(), given[1], given[2].cpu(), given[3].cpu())
    expected = outcome(sample_in_pytorch, on_cpu)
    tolerance = 10 * TOLERANCE[given[0].dtype]
    return all(
        torch.allclose(a.cpu(), b, rtol=tolerance, atol=tolerance, equal_nan=True)
        for a, b in zip(found[:parts], expected[:parts], strict=True)
    )


def edges_are_right(dtype: torch.dtype, device: str) -> bool:
    """Check points on pixel centres and edges, where the gradient jumps and must be of the same side as PyTorch's."""
    return all(same_numbers(exact_arguments(c, dtype, device, attention=(0.25, 1.0))) for c in (3, 19, 32, 40))


def infinite_values_stay(dtype: torch.dtype, device: str) -> bool:
    """Check that infinite and NaN values appear in result and gradients exactly where they do in plain PyTorch.

    Weights include 0, and 1e-40, whose product with a small bilinear weight is 0 in float32.
    """
    values, attention = (INFINITY, -INFINITY, NAN), (0.0, 1e-40, 0.5, 1.0)
    return all(
        same_numbers(exact_arguments(c, dtype, device, values=v, attention=attention))
        for c in (1, 3, 19, 32, 40)
        for v in (values[:1], values[:2], values)
    )


def infinite_attention_stays(dtype: torch.dtype, device: str) -> bool:
    """Check infinite and NaN attention in the result and the values' gradient, even at points outside of the map.

    The gradient of such a location is not compared: it is NaN in PyTorch on the CPU and 0 on CUDA.
    """
    attention = (INFINITY, NAN, 1.0, 1.0, 1.0, 1.0, 0.0)
    return all(same_numbers(exact_arguments(c, dtype, device, attention=attention), parts=2) for c in (1, 19, 32))


@contextlib.contextmanager
def deterministic(*, warn_only: bool) -> Iterator[None]:
    """Enable `torch.use_deterministic_algorithms`, which also fills new tensors with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def writes_every_element(device: str) -> bool:
    """Return whether results and gradients are right in memory initialised with NaN."""
    with deterministic(warn_only=True):
        if not torch.empty(1000, device=device).isnan().all():
            return False
        given = [arguments(channels, torch.float32, device) for channels in (0, 19, 257)]
        given += [arguments(19, torch.float32, device, points=points) for points in (0, 50)]
        given.append(arguments(19, torch.float32, device, queries=0))
        given.append(arguments(19, torch.float32, device, batch=0))
        right = [agrees(these) for these in given]
        right += [agrees_on(32, dtype, device) for dtype in TOLERANCE]
        right.append(is_zero(outside(given[1])))
    return all(right)


def refused(function: Callable[[], object], message: str) -> bool:
    """Return whether `function` raises a `RuntimeError` with `message`."""
    try:
        function()
    except RuntimeError as error:
        return message in str(error)
    return False


def is_refused_as_not_deterministic(device: str) -> bool:
    """Return whether the backward, with its unordered additions, is an error under deterministic algorithms."""
    with deterministic(warn_only=False):
        given = arguments(19, torch.float32, device)
        return refused(lambda: outcome(torch.ops.dn_detr.sample, given), "does not have a deterministic implementation")


def too_many_are_refused(device: str) -> bool:
    """Return whether 2^31 - 100 points of a row, rows, or channels, too many for the kernels' int, are rejected."""
    many, one = 2**31 - 100, torch.zeros(1, device=device)

    def call(channels: int, queries: int, points: int) -> Tensor:  # needs no memory: all elements are one
        shape = (1, queries, 1, 1, points)
        return torch.ops.dn_detr.sample(one.expand(1, 1, 1, channels), [1, 1], one.expand(*shape, 2), one.expand(shape))

    sizes = ((1, many, 1), (1, 1, many), (many, 1, 1))
    return all(refused(partial(call, *these), "expected at most") for these in sizes)


def checks(device: str) -> dict[str, Callable[[], bool]]:
    """Return the checks of a device by their printed name."""
    found: dict[str, Callable[[], bool]] = {}
    for dtype in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        found[f"result and gradients, {name}"] = partial(agrees_on, 32, dtype, device, points=4)
    for channels in GRADIENT_CHANNELS:
        found[f"gradcheck, {channels} channels"] = partial(gradients_are_right, channels, device)
    for channels in (*range(1, 34), 64, 71, 130, 257):
        found[f"float32, {channels} channels"] = partial(agrees_on, channels, torch.float32, device)
    plain = (19, torch.float32, device)
    found["one-pixel levels"] = lambda: agrees(arguments(*plain, sizes=PIXEL_SIZES))
    found["50 points, 3 levels"] = lambda: agrees(arguments(*plain, sizes=[7, 5, 4, 4, 2, 3], points=50))
    found["an empty batch"] = lambda: agrees(arguments(*plain, batch=0))
    found["no queries"] = lambda: agrees(arguments(*plain, queries=0))
    found["strided tensors"] = lambda: agrees(strided(arguments(*plain)))
    found["all points outside"] = lambda: is_zero(outside(arguments(*plain)))
    for dtype in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        found[f"points on pixel centres and edges, {name}"] = partial(edges_are_right, dtype, device)
        found[f"infinite and NaN values, {name}"] = partial(infinite_values_stay, dtype, device)
        found[f"infinite and NaN attention, {name}"] = partial(infinite_attention_stays, dtype, device)
    found["every element is written"] = partial(writes_every_element, device)
    if device == "cuda":
        found["not deterministic, backward"] = partial(is_refused_as_not_deterministic, device)
        found["2^31 points, rows or channels are refused"] = partial(too_many_are_refused, device)
    return found


def main() -> int:
    """Run every check on every device and return the exit code."""
    compiled_for = load_operator()
    if not compiled_for:
        print("the operator is installed: False")
        return 1
    devices = [device for device in ("cpu", "cuda") if device in compiled_for]
    if "cuda" in devices and not torch.cuda.is_available():
        devices.remove("cuda")
    outcomes = []
    for device in devices:
        for line, check in checks(device).items():
            outcomes.append(check())
            print(f"{device}: {line}: {outcomes[-1]}")
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
