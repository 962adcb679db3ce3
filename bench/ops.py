"""Time the sampling operator, the same in PyTorch operations and, on a GPU, the original's algorithm.

    python -m bench.ops --device cpu --rounds 5 --output FILE.json

Shapes are those of DN-Deformable-DETR at 800 x 1333 pixels in batches of 2: the encoder, whose queries are the pixels
of all levels, and the decoder with 300 queries, without and with 5 denoising groups of 20 targets. The implementations
take turns so that machine load affects all alike; figures are medians.

Milliseconds are wall time from the call to the end of its work, through autograd for all forms. The original's kernels
are called by a `torch.autograd.Function`, as in Deformable DETR. On a GPU there is also the time of the kernels alone:
that of calls without autograd that wait in the GPU's queue, so that it never waits for the CPU.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.dn_dab_deformable_detr.ops import sample_in_pytorch
from models.dn_dab_deformable_detr.ops.sampling import load_operator
from util.cli import script_parser, user_path
from util.environment import environment
from util.errors import UserError, run_cli
from util.files import write_json
from util.logging import table

SIZES = [100, 167, 50, 84, 25, 42, 13, 21]  # 800 x 1333 at strides 8 to 64
BATCH, HEADS, CHANNELS, POINTS = 2, 8, 32, 4
SHAPES = {"encoder": None, "decoder": 300, "decoder with denoising": 400}
SPREAD_PIXELS = 3.0  # standard deviation of the points around their reference
COPY_BYTES = 1 << 28
FORMS = ("operator", "PyTorch", "original")
QUEUED_CALLS = 20  # for the time of the kernels
QUEUE_CYCLES = 10_000_000  # of the GPU, several milliseconds, more than the CPU needs for these calls
KERNEL_ROUNDS = 5

Arguments = tuple[Tensor, list[int], Tensor, Tensor]
Form = Callable[[Arguments], Tensor]
# The forward and the backward without autograd; the backward also takes the gradient of the result.
Kernels = tuple[Callable[[Arguments], Any], Callable[[Tensor, Arguments], Any]]


def reference_points() -> Tensor:
    """Return the pixel centres of all levels, S x 2 (x, y) in [0, 1]."""
    points = []
    for height, width in zip(SIZES[::2], SIZES[1::2], strict=True):
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        points.append(torch.stack((x, y), -1).flatten(0, 1))
    return torch.cat(points)


def arguments(queries: int | None, dtype: torch.dtype, device: torch.device) -> Arguments:
    """Return arguments of the operator; queries are at random points, or (None) one at each pixel."""
    generator = torch.Generator().manual_seed(0)
    reference = reference_points()
    pixels, levels = len(reference), len(SIZES) // 2
    if queries is not None:
        reference = torch.rand(queries, 2, generator=generator)
    sizes_wh = torch.tensor(SIZES).view(levels, 2).flip(-1)[:, None]
    shape = (BATCH, len(reference), HEADS, levels, POINTS)
    offsets = SPREAD_PIXELS * torch.randn(*shape, 2, generator=generator) / sizes_wh
    locations = reference[:, None, None, None] + offsets
    weights = torch.randn(shape, generator=generator).flatten(3).softmax(-1).view(shape)
    value = torch.randn(BATCH, pixels, HEADS, CHANNELS, generator=generator)
    tensors = [t.to(device).requires_grad_() for t in (value.to(dtype), locations, weights)]
    return tensors[0], SIZES, tensors[1], tensors[2]


def load_original() -> Any:
    """Compile the original's algorithm; returns its operators."""
    from torch.utils.cpp_extension import load

    load("original_sampling", [str(Path(__file__).with_name("original_sampling.cu"))], is_python_module=False)
    return torch.ops.dn_detr_bench


class OriginalFunction(torch.autograd.Function):
    """The original's algorithm with autograd, like Deformable DETR's `MSDeformAttnFunction`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """Compute the result; `sizes` is L x 2 (h, w) on the device."""
        ctx.save_for_backward(value, sizes, locations, weights)
        return torch.ops.dn_detr_bench.original_sample(value, sizes, locations, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of value, locations and weights."""
        value, locations, weights = torch.ops.dn_detr_bench.original_backward(gradient, *ctx.saved_tensors)
        return value, None, locations, weights


def forms(device: torch.device, dtype: torch.dtype) -> dict[str, Form]:
    """Return the implementations to time."""
    found: dict[str, Form] = {
        "operator": lambda given: torch.ops.dn_detr.sample(*given),
        "PyTorch": lambda given: sample_in_pytorch(*given),
    }
    if _has_original(device, dtype):
        load_original()
        sizes = torch.tensor(SIZES, device=device).view(-1, 2)
        found["original"] = lambda given: OriginalFunction.apply(given[0], sizes, given[2], given[3])
    return found


def kernels(device: torch.device, dtype: torch.dtype) -> dict[str, Kernels]:
    """Return the calls whose time on the device is that of the kernels."""
    operator = torch.ops.dn_detr
    found: dict[str, Kernels] = {
        "operator": (
            lambda given: operator.sample(*given),
            lambda gradient, given: operator.sample_backward(gradient, *given),
        )
    }
    if _has_original(device, dtype):
        original = load_original()
        sizes = torch.tensor(SIZES, device=device).view(-1, 2)
        found["original"] = (
            lambda given: original.original_sample(given[0], sizes, *given[2:]),
            lambda gradient, given: original.original_backward(gradient, given[0], sizes, *given[2:]),
        )
    return found


def _has_original(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.float32


def measure(given: Arguments, named: dict[str, Form], rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of each form, forward and backward, and its greatest difference from PyTorch."""
    device = given[0].device
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in named}
    results: dict[str, list[Tensor]] = {}
    for turn in range(rounds + 1):
        for name, form in named.items():
            start = _now(device)
            out = form(given)
            middle = _now(device)
            gradients = torch.autograd.grad(out, (given[0], given[2], given[3]), torch.ones_like(out))
            end = _now(device)
            if turn == 0:  # the first turn is for warm-up and comparison of the results
                results[name] = [t.detach().double() for t in (out, *gradients)]
            else:
                seconds[name]["forward"].append(middle - start)
                seconds[name]["backward"].append(end - middle)
    expected = results["PyTorch"]
    return {
        name: {
            **{part: statistics.median(values) for part, values in seconds[name].items()},
            "difference": max(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(results[name], expected, strict=True)
            ),
        }
        for name in named
    }


def kernel_milliseconds(given: Arguments, named: dict[str, Kernels]) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of a call on the GPU, forward and backward, filling with zeros included."""
    value, sizes, locations, weights = given
    detached = (value.detach(), sizes, locations.detach(), weights.detach())
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, (forward, backward) in named.items():
        gradient = torch.ones_like(forward(detached))
        calls[name, "forward"] = functools.partial(forward, detached)
        calls[name, "backward"] = functools.partial(backward, gradient, detached)
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(KERNEL_ROUNDS):
        for key, call in calls.items():
            found[key].append(_queued_milliseconds(call, value.device))
    return {name: {part: statistics.median(found[name, part]) for part in ("forward", "backward")} for name in named}


def _queued_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds on the GPU of one of many calls that were all queued before the first one started."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        for _ in range(QUEUED_CALLS):
            call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / QUEUED_CALLS


def bytes_moved(given: Arguments) -> dict[str, int]:
    """Return the bytes that forward and backward move if every number is moved once."""
    value, _, locations, weights = given
    out = locations.shape[0] * locations.shape[1] * HEADS * CHANNELS * value.element_size()
    inputs = value.nbytes + locations.nbytes + weights.nbytes
    return {"forward": inputs + out, "backward": 2 * inputs + out}


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a large copy reads and writes."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        start = _now(device)
        target.copy_(source)
        seconds.append(_now(device) - start)
    return 2 * COPY_BYTES / statistics.median(seconds[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure all shapes and types: time, speed-up over the other forms, share of the bandwidth of a copy."""
    bandwidth = copy_bandwidth(device)
    found = {"environment": environment(device), "rounds": rounds, "copy_GB_per_s": bandwidth / 1e9, "cases": []}
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    for shape, queries in SHAPES.items():
        for dtype in dtypes:
            given = arguments(queries, dtype, device)
            measured = measure(given, forms(device, dtype), rounds)
            queued = kernel_milliseconds(given, kernels(device, dtype)) if device.type == "cuda" else {}
            for part, count in bytes_moved(given).items():
                own = measured["operator"][part]
                case: dict[str, Any] = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "part": part}
                case["milliseconds"] = {form: 1000 * figures[part] for form, figures in measured.items()}
                case["times_as_quick_as"] = {f: v[part] / own for f, v in measured.items() if f != "operator"}
                if queued:
                    case["kernel_milliseconds"] = {name: figures[part] for name, figures in queued.items()}
                case["share_of_copy_bandwidth"] = count / own / bandwidth
                case["difference_from_pytorch"] = measured["operator"]["difference"]
                found["cases"].append(case)
    return found


def result_table(found: dict[str, Any]) -> str:
    """Format the figures as a table."""
    rows = []
    for case in found["cases"]:
        milliseconds, ratios = case["milliseconds"], case["times_as_quick_as"]
        cells = [f"{milliseconds[form]:.2f}" if form in milliseconds else "-" for form in FORMS]
        cells += [f"{ratios[form]:.1f}" if form in ratios else "-" for form in FORMS[1:]]
        kernel = case.get("kernel_milliseconds", {})
        cells += [f"{kernel[form]:.3f}" if form in kernel else "-" for form in ("operator", "original")]
        share = f"{100 * case['share_of_copy_bandwidth']:.0f}%"
        rows.append((case["shape"], case["dtype"], case["part"], *cells, share))
    titles = ("operator ms", "PyTorch ms", "original ms", "x PyTorch", "x original", "kernel ms", "original kernel ms")
    return table(("shape", "type", "part", *titles, "of copy"), rows)


def main() -> None:
    """Run the benchmark."""
    parser = script_parser(__doc__, prog="python -m bench.ops")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to time, after a warm-up round")
    parser.add_argument("--output", type=user_path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds: found {args.rounds}, expected at least 1")
    device = torch.device(args.device)
    if device.type not in load_operator():
        raise UserError(
            f"--device {args.device}: found no compiled operator, expected one installed by "
            "models/dn_dab_deformable_detr/ops/setup.py"
        )
    found = run(device, args.rounds)
    print("{device}, torch {torch}, {threads} threads".format(**found["environment"]))
    print(result_table(found))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, found)


if __name__ == "__main__":
    run_cli(main)
