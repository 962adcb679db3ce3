"""Time each step of a detector within a whole forward pass: by the clock on a CPU, by events on CUDA."""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from engine import autocast
from models.detector import Detector

FRONT, HEADS, WHOLE = "front", "heads", "detector"
# Launches dominate where a CUDA graph of the whole detector takes less than this part of the time without one.
GRAPH_GAIN = 0.8

Step = tuple[str, Callable[[Any], Any]]  # its name, and a function of the state before it

POSITIONS, ATTENTIONS = "positions", ("self_attention", "cross_attention")  # of a decoder layer


def steps_of(model: Detector, images: list[Tensor], scope: str) -> list[Step]:
    """Return the steps of a forward pass: the part before a scope, its modules in network order, and the heads.

    The last residual block includes the projection and the positions of pixels, the last module of a layer its boxes.
    The positions of a decoder layer's queries, which its attentions share, are a step of their own before the
    self-attention, unless both attentions are removed.
    """
    names = model.steps_in(scope)
    decoder: Any = model.transformer.decoder
    steps: list[Step] = [(FRONT, lambda _: model.start(model.front(images, scope)))]
    for name, stop in zip(names, (*names[1:], None), strict=True):
        layer, _, block = name.rpartition(".")
        if layer.startswith("decoder.") and block == "self_attention":
            index = int(layer.removeprefix("decoder."))
            if any(model.widths.of(f"{layer}.{attention}") for attention in ATTENTIONS):
                steps.append((f"{layer}.{POSITIONS}", functools.partial(decoder.position_queries, index)))
            steps.append((name, functools.partial(decoder.self_attention, index)))
        else:
            steps.append((name, functools.partial(model.run_steps, start=name, stop=stop)))
    return [*steps, (HEADS, model.outputs)]


def attentions_of(positions: str, widths: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names of the attentions that use the positions of a layer's queries, of those with `widths`."""
    layer = positions.removesuffix(POSITIONS)
    return tuple(name for name in (f"{layer}{block}" for block in ATTENTIONS) if widths.get(name))


def whole_of(model: Detector, images: list[Tensor]) -> list[Step]:
    """Return the whole forward pass as one step."""
    return [(WHOLE, lambda _: model(images))]


@torch.no_grad()
def kinds_of(steps: Sequence[Step], device: torch.device, amp: str) -> dict[str, str]:
    """Return for each step a digest of its operations and their shapes; steps of one digest take the same time."""
    kinds, state = {}, None
    with autocast(device, amp):
        for name, run in steps:
            with _Operations() as operations:
                state = run(state)
            kinds[name] = hashlib.sha256("\n".join(operations.found).encode()).hexdigest()[:16]
    return kinds


class _Operations(TorchDispatchMode):
    """Records the operations that run, with the shapes and strides of their tensors and all arguments but devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record and run one operation."""
        kwargs = kwargs or {}
        self.found.append(f"{func} {tree_map(_shown, (args, kwargs))}")
        return func(*args, **kwargs)


def _shown(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), str(argument.dtype)
    return "device" if isinstance(argument, torch.device) else argument


@torch.no_grad()
def time_steps(
    steps: Sequence[Step], device: torch.device, amp: str, *, repeats: int, warm_up: int = 1, graphs: bool = False
) -> dict[str, list[float]]:
    """Return the milliseconds of each step in each of several passes.

    On one CPU thread this is process time, which excludes waiting for other processes.

    Args:
        amp: precision, a key of `engine.AMP_DTYPES`.
        repeats: passes that are timed.
        warm_up: passes before them.
        graphs: replay a CUDA graph of each step, so that launching its kernels takes no time.
    """
    steps = captured(steps, device, amp) if graphs else steps
    milliseconds: dict[str, list[float]] = {name: [] for name, _ in steps}
    run_pass = _pass_on_cuda if device.type == "cuda" else _pass_on_cpu
    for turn in range(warm_up + repeats):
        with autocast(device, amp):
            times = run_pass(steps)
        if turn >= warm_up:
            for (name, _), value in zip(steps, times, strict=True):
                milliseconds[name].append(value)
    return milliseconds


def _pass_on_cpu(steps: Sequence[Step]) -> list[float]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    state, marks = None, [clock()]
    for _, run in steps:
        state = run(state)
        marks.append(clock())
    return [1000 * (after - before) for before, after in itertools.pairwise(marks)]


def _pass_on_cuda(steps: Sequence[Step]) -> list[float]:
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    state = None
    events[0].record()
    for (_, run), event in zip(steps, events[1:], strict=True):
        state = run(state)
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


@torch.no_grad()
def captured(steps: Sequence[Step], device: torch.device, amp: str) -> list[Step]:
    """Return steps that replay a CUDA graph of each; each reads the state that the replay before it wrote."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # libraries allocate their workspaces in the first passes
        for _ in range(3):
            with autocast(device, amp):
                state = None
                for _, run in steps:
                    state = run(state)
    torch.cuda.current_stream(device).wait_stream(stream)
    # The graphs share memory, so they only give the right states in the order in which they were captured.
    replays: list[Step] = []
    pool, state = torch.cuda.graph_pool_handle(), None
    with autocast(device, amp):
        for name, run in steps:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                state = run(state)
            replays.append((name, functools.partial(_replay, graph, state)))
    return replays


def _replay(graph: Any, state: Any, before: Any) -> Any:
    """Replay a graph and return `state`, which it writes; it reads the state `before` where that was captured."""
    graph.replay()
    return state


def launches_dominate(model: Detector, images: list[Tensor], device: torch.device, amp: str) -> bool:
    """Return whether a CUDA graph of the detector is much faster; False if it cannot be captured, and on a CPU."""
    if device.type != "cuda":
        return False
    steps = whole_of(model, images)
    eager = min(time_steps(steps, device, amp, repeats=5, warm_up=2)[WHOLE])
    try:
        replayed = min(time_steps(steps, device, amp, repeats=5, graphs=True)[WHOLE])
    except RuntimeError:  # an operation waits for the GPU
        torch.cuda.synchronize()
        return False
    return replayed < GRAPH_GAIN * eager
