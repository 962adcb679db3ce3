"""Export detectors to ONNX and torch.export, independent of this code, and check files before renaming them.

One graph serves images and batches of any size, and as TensorRT requires, no shape in it depends on a value. The
deformable variant's sampling is exported as grid_sample, not as the compiled operator.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from models.dn_dab_deformable_detr.ops import without_operator
from models.padding import PaddedImages
from models.post_process import PostProcess
from tools.export_check import Case, Runner, check_export
from util.errors import UserError
from util.files import write_atomic

FORMATS = ("onnx", "pt2")
GREATEST_OPSET = 22  # from 23 on, PyTorch writes Attention, which onnxruntime does not support with a mask
GREATEST_SIDE = 4096  # pixels; the check runs batches of such images
LEAST_OPSET = 20  # the first whose GridSample calls its interpolation `linear`
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}
# ONNX operators whose output shape or execution depends on values.
DATA_DEPENDENT = {"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "StringSplit", "Unique"}
PROBE_SIDE = 1024


class ExportModule(nn.Module):
    """Wrap a detector for export, with tensors as inputs and outputs.

    Args:
        model: the detector in eval mode.
        postprocess: if given, also select detections.
    """

    def __init__(self, model: nn.Module, postprocess: PostProcess | None) -> None:
        super().__init__()
        self.model = model
        self.postprocess = postprocess

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs of `forward`."""
        return ("pred_logits", "pred_boxes", *(("scores", "labels", "boxes") if self.postprocess else ()))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return logits B x Q x C and boxes B x Q x 4 (cxcywh in [0, 1] of each unpadded image).

        With `postprocess`, also return scores B x K, labels B x K (int64) and boxes B x K x 4 (xyxy in [0, 1]).

        Args:
            images: B x 3 x H x W, normalised.
            mask: B x H x W bool, True on padding; None if no image is padded. It limits the transformer to each image's
            own feature pixels; the convolutions see the padding.
        """
        outputs = self.model(images if mask is None else PaddedImages(images, mask))
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        return (logits, boxes, *(self.postprocess.select(logits, boxes) if self.postprocess else ()))


@dataclass(frozen=True)
class ExportResult:
    """Result of an export and its check; the file exists only if all cases passed.

    Attributes:
        opset: None for a torch.export program.
    """

    path: Path
    megabytes: float
    opset: int | None
    cases: list[Case]

    @property
    def passed(self) -> bool:
        """Whether every case passed."""
        return all(case.passed for case in self.cases)


def require_packages(formats: Sequence[str]) -> None:
    """Raise a `UserError` that names the first missing package for the formats."""
    for name in (package for format_ in formats for package in PACKAGES[format_]):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"--format onnx: found no package {name}, expected it beside PyTorch (pip install '.[export]')"
            ) from None


def export(
    model: nn.Module,
    postprocess: PostProcess,
    paths: Mapping[str, Path],
    sizes_hw: Sequence[tuple[int, int]],
    *,
    opset: int = LEAST_OPSET,
    with_mask: bool = True,
    with_detections: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[ExportResult]:
    """Write and check a detector in each format of `paths`; a file that fails is removed.

    Args:
        paths: format -> file.
        sizes_hw: height and width of images for the check.
        with_mask: add the padding mask as an input.
        with_detections: also select detections in the graph.
        metadata: texts to store in the files.
        progress: called with the name of the next stage: twice for a format and once for each case of the check.
    """
    model.eval()
    module = ExportModule(model, postprocess if with_detections else None).eval()
    least = least_side(model)
    for height, width in sizes_hw:
        if min(height, width) < least:
            raise UserError(f"--image_size_hw {height} {width}: expected sides of at least {least} pixels")
    progress("tracing")
    program = trace(module, sizes_hw[0], least, with_mask)
    results = []
    for format_, path in paths.items():
        progress(f"writing {format_}")
        facts = {**(metadata or {}), **({"opset": str(opset)} if format_ == "onnx" else {})}
        if format_ == "onnx":
            data = to_onnx(program, module, opset, facts)
            run = onnx_runner(data)
        else:
            data = to_bytes(program, facts)
            run = program_runner(data, module.output_names)

        def next_case(stage: str = f"checking {format_}") -> None:
            progress(stage)

        next_case()
        cases = check_export(run, model, postprocess, sizes_hw, with_mask=with_mask, progress=next_case)
        result = ExportResult(path, len(data) / 1e6, opset if format_ == "onnx" else None, cases)
        if result.passed:
            write_atomic(path, lambda stream, data=data: stream.write(data))
        results.append(result)
    return results


def least_side(model: nn.Module) -> int:
    """Return the least side of an image in pixels: the smallest feature map needs two rows and columns."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        rows = model.features(torch.empty(1, 3, PROBE_SIDE, PROBE_SIDE)).paddings[-1].shape[-2]
    return PROBE_SIDE // rows + 1


def trace(module: ExportModule, size_hw: tuple[int, int], least: int, with_mask: bool) -> ExportedProgram:
    """Export the module as a graph for batches and images of any size from `least` pixels up."""
    height, width = (max(side, 2 * least) for side in size_hw)
    inputs = [torch.zeros(2, 3, height, width)]
    if with_mask:
        inputs.append(torch.zeros(2, height, width, dtype=torch.bool))
    with torch.no_grad(), without_operator(), _quiet():
        shapes = dynamic_shapes(with_mask, least)
        return torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, strict=False)


def dynamic_shapes(with_mask: bool, least: int | None = None) -> dict[str, dict[int, Any]]:
    """Return the dynamic axes of the inputs: as dimensions from `least` up, or as names without `least`."""
    batch, height, width = "batch", "height", "width"
    if least is not None:
        batch, height, width = Dim(batch, min=1), Dim(height, min=least), Dim(width, min=least)
    shapes = {"images": {0: batch, 2: height, 3: width}}
    return {**shapes, "mask": {0: batch, 1: height, 2: width}} if with_mask else shapes


def to_onnx(program: ExportedProgram, module: ExportModule, opset: int, metadata: Mapping[str, str]) -> bytes:
    """Convert the program to the bytes of an ONNX file.

    Raises:
        RuntimeError: the graph has operators that TensorRT and other runtimes do not support.
    """
    onnx = importlib.import_module("onnx")
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=names,
            output_names=module.output_names,
            dynamic_shapes=dynamic_shapes("mask" in names),
        )
    model = exported.model_proto
    check_graph(model)
    onnx.helper.set_model_props(model, dict(metadata))
    return model.SerializeToString()


def check_graph(model: Any) -> None:
    """Raise a `RuntimeError` if an ONNX model has value-dependent shapes or operators that are not ONNX's."""
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain} - {"ai.onnx"})
    dependent = sorted({node.op_type for node in model.graph.node} & DATA_DEPENDENT)
    if foreign or dependent:
        raise RuntimeError(f"found the operators {', '.join(foreign + dependent)} in the exported graph")


def to_bytes(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """Convert the program to the bytes of a .pt2 file, with metadata as JSON in the extra file `metadata.json`."""
    stream = io.BytesIO()
    with _quiet():
        torch.export.save(program, stream, extra_files={"metadata.json": json.dumps(dict(metadata))})
    return stream.getvalue()


def onnx_runner(data: bytes) -> Runner:
    """Return a function that runs the bytes of an ONNX file with onnxruntime on the CPU."""
    session = importlib.import_module("onnxruntime").InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

    return run


def program_runner(data: bytes, output_names: Sequence[str]) -> Runner:
    """Return a function that runs the bytes of a .pt2 file with PyTorch."""
    module = torch.export.load(io.BytesIO(data)).module()

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(output_names, module(*inputs.values()), strict=True))

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of PyTorch's exporters."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)
