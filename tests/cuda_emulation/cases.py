"""Random calls of the emulated CUDA operator against plain PyTorch in double.

`python -m tests.cuda_emulation.cases FIRST LAST` runs the cases of the seeds from FIRST to LAST - 1 and stops at the
first that differs. The emulated library must be in PYTHONPATH.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from models.dn_dab_deformable_detr.ops import sample_in_pytorch
from models.dn_dab_deformable_detr.ops.sampling import load_operator

# Largest difference, relative to the largest number, by the type of the result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Channels of a head for each width of a group of lanes and of vectors, and for several rounds of a group.
CHANNELS = (4, 32, 20, 64, 68, 132, 260, 2, 6, 14, 30, 34, 66, 1, 3, 7, 9, 15, 19, 31, 33, 71)
NOWHERE = (-3.0, 7.0, float("inf"), float("-inf"), float("nan"), 1e30)
PLACES = ("inside", "around", "outside", "one spot", "quarters")
LAYOUTS = ("plain", "swapped", "shifted", "gapped")


@dataclass(frozen=True)
class Case:
    """A call of the operator; see `sample`."""

    dtype: torch.dtype
    channels: int
    heads: int
    batch: int
    queries: int
    points: int
    sizes: tuple[int, ...]
    places: str
    layout: str
    nan_values: bool


def pixels_of(sizes: tuple[int, ...]) -> int:
    """The pixels of all levels."""
    return sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))


def drawn(seed: int) -> Case:
    """The case of a seed; consecutive seeds have each channels with each type."""
    rng = random.Random(seed)
    dtypes = list(TOLERANCE)
    levels, points = rng.randint(1, 4), rng.randint(1, 6)
    if rng.random() < 0.06:
        levels, points = rng.choice(((16, 2), (2, 40), (1, 129)))
    places = rng.choice(PLACES)
    sides = (1, 2, 4, 8) if places == "quarters" else (1, 1, 2, 3, 5, 13)
    batch, queries, heads = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 5, 17, 60)), rng.choice((1, 2, 3, 8))
    if rng.random() < 0.04:
        batch, queries, points = rng.choice(((0, 2, 2), (2, 0, 2), (2, 2, 0)))
    while batch * queries * heads * levels * points > 3000:
        queries = (queries + 1) // 2
        heads = (heads + 1) // 2
    sizes = tuple(rng.choice(sides) for _ in range(2 * levels))
    if rng.random() < 0.25 and pixels_of(sizes) * levels * points <= 3000:
        batch, queries, heads = min(batch, 2), pixels_of(sizes), min(heads, 2)  # an encoder
    return Case(
        dtype=dtypes[seed % len(dtypes)],
        channels=CHANNELS[seed // len(dtypes) % len(CHANNELS)],
        heads=heads,
        batch=batch,
        queries=queries,
        points=points,
        sizes=sizes,
        places=places,
        layout=rng.choice(LAYOUTS),
        nan_values=rng.random() < 0.4,
    )


def locations_of(case: Case, generator: torch.Generator) -> Tensor:
    """B x Q x heads x levels x points x 2 in double, away from pixel centres, where the gradient jumps, or on them."""
    sizes_wh = torch.tensor(case.sizes, dtype=torch.float64).view(-1, 2).flip(-1)[:, None]
    shape = (case.batch, case.queries, case.heads, len(case.sizes) // 2, case.points, 2)
    random_part = torch.rand(shape, generator=generator, dtype=torch.float64)
    if case.places == "quarters":  # of a pixel, from one pixel outside of the map to the other
        quarters = torch.randint(-5, 4 * 8 + 2, shape, generator=generator) / 4
        return (quarters.minimum(sizes_wh + 0.25) + 0.5) / sizes_wh
    if case.places == "outside":
        nowhere = torch.tensor(NOWHERE, dtype=torch.float64)
        return nowhere[torch.randint(len(NOWHERE), shape, generator=generator)]
    spread = random_part if case.places == "inside" else 1.8 * random_part - 0.4
    if case.places == "one spot":
        spread = spread[:, :1, :1].expand(shape)
    grid = spread * sizes_wh - 0.5
    return (grid.floor() + (grid - grid.floor()).clamp(0.05, 0.95) + 0.5) / sizes_wh


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides, or at an address that vectors do not fit."""
    if layout == "swapped":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "shifted":
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return room[1:].view(tensor.shape).copy_(tensor)
    if layout == "gapped":
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]
    return tensor


def expected_of(value: Tensor, case: Case, locations: Tensor, weights: Tensor, upstream: Tensor) -> list[Tensor]:
    """Result and gradients of plain PyTorch in double. There, locations that are not finite give NaN, not 0."""
    locations = torch.where(locations.isfinite(), locations, NOWHERE[1])
    inputs = [tensor.detach().double().requires_grad_() for tensor in (value, locations, weights)]
    out = sample_in_pytorch(inputs[0], list(case.sizes), inputs[1], inputs[2])
    gradients = torch.autograd.grad(out, inputs, upstream.double(), allow_unused=True)
    return [out, *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True))]


def arguments(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, locations, weights and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(case.dtype, torch.float32)
    locations = locations_of(case, generator).to(wide)
    weights = torch.rand(locations.shape[:-1], generator=generator).to(wide) - 0.2
    value = 2 * torch.rand(case.batch, pixels_of(case.sizes), case.heads, case.channels, generator=generator) - 1
    upstream = torch.rand(case.batch, case.queries, case.heads, case.channels, generator=generator) - 0.5
    value, upstream = value.to(case.dtype), upstream.to(case.dtype)
    # NaN in pixels that no point touches. Points on quarters of a pixel may touch one with the weight 0.
    if case.nan_values and case.places != "quarters":
        touched = expected_of(value, case, locations, torch.ones_like(weights), torch.ones_like(upstream))[1]
        value = torch.where(touched == 0, torch.nan, value)
    laid = (laid_out(tensor, case.layout) for tensor in (value, locations, weights, upstream))
    return tuple(laid)


def difference(seed: int) -> str | None:
    """Run the case of a seed; return what differs, or None. New tensors are filled with NaN meanwhile."""
    case = drawn(seed)
    os.environ["CUDA_EMULATION_SEED"] = str(seed)
    value, locations, weights, upstream = arguments(case, seed)
    operator, sizes = torch.ops.dn_detr, list(case.sizes)
    found = [
        operator.sample(value, sizes, locations, weights),
        *operator.sample_backward(upstream, value, sizes, locations, weights),
    ]
    dtypes = [case.dtype, case.dtype, locations.dtype, weights.dtype]
    expected = expected_of(value, case, locations, weights, upstream)
    for name, a, b, dtype in zip(("result", "value", "locations", "weights"), found, expected, dtypes, strict=True):
        if a.shape != b.shape or a.dtype != dtype:
            return f"{case}: {name} is {a.dtype} {tuple(a.shape)}, expected {dtype} {tuple(b.shape)}"
        tolerance = TOLERANCE[dtype] * max([1.0, *b.abs().flatten().tolist()])
        if not torch.allclose(a.double(), b, rtol=0, atol=tolerance):
            return f"{case}: {name} differs by {float((a.double() - b).abs().max())}, expected at most {tolerance}"
    return None


def main() -> int:
    first, last = map(int, sys.argv[1:])
    assert load_operator() == {"cpu"}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    warnings.simplefilter("ignore")
    assert torch.empty(100).isnan().all()
    for seed in range(first, last):
        if problem := difference(seed):
            print(f"seed {seed}: {problem}")
            return 1
    print(f"{last - first} cases agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
