"""Time detectors in the runtimes that people deploy: PyTorch, onnxruntime and OpenVINO, on one CPU thread."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from models.detector import Detector
from models.folding import folded_copy
from models.post_process import PostProcess
from tools.export_check import Runner, greatest_difference
from tools.export_formats import ExportModule, GraphForm, least_side, onnx_runner, to_onnx, trace
from util.errors import UserError
from util.phases import TIMINGS, phase
from util.timing import seconds_side_by_side

EAGER, ONNXRUNTIME, OPENVINO = "PyTorch", "onnxruntime", "OpenVINO"
CPU = torch.device("cpu")
Calls = Mapping[tuple[str, str], Callable[[], Any]]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Make PyTorch use one CPU thread inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def onnx_of(detector: Detector, image_hw: tuple[int, int], form: GraphForm) -> bytes:
    """Return a detector as the bytes of an ONNX file, not checked."""
    module = ExportModule(folded_copy(detector), PostProcess(1) if form.with_detections else None).eval()
    return to_onnx(trace(module, image_hw, least_side(detector), form), module, form, {})


def has_openvino() -> bool:
    """Return whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def openvino_runner(data: bytes) -> Runner:
    """Return a function that runs the bytes of an ONNX file with OpenVINO in float32 on one thread of the CPU."""
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(data), "CPU", settings)

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
        return {port.get_any_name(): torch.from_numpy(found[port].copy()) for port in compiled.outputs}

    return run


def runtime_calls(detectors: Mapping[str, Detector], images: Tensor, form: GraphForm, tolerance: float) -> Calls:
    """Return, by runtime and detector, a function that runs the detector on the images, after a check of its outputs.

    Args:
        detectors: by name.
        images: B x 3 x H x W, normalised, without padding.
        form: of the graphs; it takes no mask, and fixed shapes if any must be those of the images.
        tolerance: greatest difference of an output from PyTorch's.

    Raises:
        UserError: a runtime gives other outputs.
    """
    runners = {
        ONNXRUNTIME: functools.partial(onnx_runner, threads=1),
        **({OPENVINO: openvino_runner} if has_openvino() else {}),
    }
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, detector in detectors.items():
        eager = folded_copy(detector)
        calls[EAGER, name] = functools.partial(torch.no_grad()(eager), images)
        data = onnx_of(detector, tuple(images.shape[2:]), form)
        for runtime, runner in runners.items():
            run = functools.partial(runner(data), {"images": images})
            found, expected = run(), calls[EAGER, name]()
            difference = max(greatest_difference(found[key], expected[key]) for key in ("pred_logits", "pred_boxes"))
            if difference > tolerance:
                raise UserError(
                    f"{runtime}: found a difference of {difference:.1e} from PyTorch, expected {tolerance:g}"
                )
            calls[runtime, name] = run
    return calls


def time_calls(
    calls: Calls, rounds: int, baseline: str, on_turn: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Time the calls in turns on one thread; return the median milliseconds of each, and of its ratio to `baseline`.

    `speed_up` is the median over the rounds of the time of the detector `baseline` / time in the same runtime.
    """
    named = {f"{runtime} {name}": call for (runtime, name), call in calls.items()}
    with one_thread(), phase(TIMINGS, rounds):
        seconds = seconds_side_by_side(named, CPU, rounds=rounds, on_turn=on_turn)
    rows = []
    for runtime, name in calls:
        own, reference = seconds[f"{runtime} {name}"], seconds.get(f"{runtime} {baseline}")
        row = {"runtime": runtime, "detector": name, "milliseconds": 1000 * statistics.median(own)}
        if reference is not None:
            row["speed_up"] = statistics.median(a / b for a, b in zip(reference, own, strict=True))
        rows.append(row)
    return rows
