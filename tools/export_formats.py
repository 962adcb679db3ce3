"""Export detectors to ONNX and torch.export, independent of this code, and check files before renaming them.

A graph serves images and batches of any size or of one, and no shape in it depends on a value. Batch norms are folded
into convolutions. The deformable variant's sampling is exported as grid_sample or as gather, not as the compiled
operator.
"""

from __future__ import annotations

import contextlib
import copy
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

from models.detector import Detector
from models.dn_dab_deformable_detr.ops import sample_by_gather, sample_in_pytorch, without_operator
from models.folding import folded_copy
from models.padding import PaddedImages
from models.post_process import PostProcess
from tools.export_check import BATCH_SIZES, TOLERANCE, Case, Runner, check_export
from tools.export_graph import check_graph, fold_constants
from tools.export_half import HALF_TOLERANCE, rounded_twin, to_half
from util.errors import UserError
from util.files import write_atomic

FORMATS = ("onnx", "pt2")
HALF = "fp16"  # ONNX with float16 weights
SUFFIXES = {"onnx": "onnx", HALF: "fp16.onnx", "pt2": "pt2"}
GREATEST_OPSET = 22  # from 23 on, PyTorch writes Attention, which onnxruntime does not support with a mask
GREATEST_SIDE = 4096  # pixels; the check runs batches of such images
LEAST_OPSET = 18  # PyTorch has no operators of older ones, and ONNX cannot convert these graphs to them
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}
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
class GraphForm:
    """What an exported graph takes, gives and is made of.

    Attributes:
        opset: of ONNX.
        with_mask: take the padding mask as an input.
        with_detections: also select detections.
        by_gather: sample feature maps by reading pixels, not by grid_sample.
        batch_size: take batches of that many images, all of one size; None for batches and images of any size.
    """

    opset: int = LEAST_OPSET
    with_mask: bool = True
    with_detections: bool = False
    by_gather: bool = False
    batch_size: int | None = None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes to check."""
        return BATCH_SIZES if self.batch_size is None else (self.batch_size,)

    @property
    def refused(self) -> frozenset[str]:
        """ONNX operators that the graph must not have: one of fixed shapes computes no shape."""
        names = {"GridSample": self.by_gather, "Shape": self.batch_size is not None, "BatchNormalization": True}
        return frozenset(name for name, is_refused in names.items() if is_refused)


DEFAULT_FORM = GraphForm()


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
    model: Detector,
    postprocess: PostProcess,
    paths: Mapping[str, Path],
    sizes_hw: Sequence[tuple[int, int]],
    form: GraphForm = DEFAULT_FORM,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[ExportResult]:
    """Check a detector in each format of `paths`, then write the files that passed.

    An error in any of them leaves all files as they were.

    Args:
        model: the detector, in training or eval mode; a copy in eval mode with folded batch norms is exported.
        paths: format -> file.
        sizes_hw: height and width of images for the check; with a fixed batch, that of all images.
        form: of the graphs.
        metadata: texts to store in the files.
        progress: called with the name of the next stage: twice for a format and once for each case of the check.
    """
    model = copy.deepcopy(model).eval()  # for the check, too
    module = ExportModule(folded_copy(model), postprocess if form.with_detections else None).eval()
    check_sizes(model, sizes_hw)
    progress("tracing")
    program = trace(module, sizes_hw[0], least_side(model), form)
    results, contents = [], {}
    for format_, path in paths.items():
        progress(f"writing {format_}")
        data, runs = _content(format_, program, module, form, metadata or {})

        def next_case(stage: str = f"checking {format_}") -> None:
            progress(stage)

        next_case()
        tolerance = HALF_TOLERANCE if format_ == HALF else TOLERANCE
        of_runs = [
            check_export(
                run, model, postprocess, sizes_hw, form.batch_sizes, with_mask=form.with_mask, tolerance=tolerance,
                as_scores=format_ == HALF,
                progress=next_case if run is runs[0] else lambda: None,
            )
            for run in runs
        ]  # fmt: skip
        cases = [max(of_case, key=lambda case: case.difference) for of_case in zip(*of_runs, strict=True)]
        result = ExportResult(path, len(data) / 1e6, None if format_ == "pt2" else form.opset, cases)
        if result.passed:
            contents[path] = data
        results.append(result)
    for path, data in contents.items():
        write_atomic(path, lambda stream, data=data: stream.write(data))
    return results


def _content(
    format_: str, program: ExportedProgram, module: ExportModule, form: GraphForm, metadata: Mapping[str, str]
) -> tuple[bytes, list[Runner]]:
    """Return the bytes of a file, and functions that run them; each is to be checked."""
    if format_ == "pt2":
        data = to_bytes(program, metadata)
        return data, [program_runner(data, module.output_names)]
    facts = {**metadata, "opset": str(form.opset), "precision": "float16" if format_ == HALF else "float32"}
    data = to_onnx(program, module, form, facts, in_half=format_ == HALF)
    runs = [onnx_runner(data)]
    if len(runs) < runs_to_check(format_):
        model = importlib.import_module("onnx").load_model_from_string(data)
        runs.append(onnx_runner(rounded_twin(model).SerializeToString()))
    return data, runs


def runs_to_check(format_: str) -> int:
    """Return how many functions run a file of that format in its check: also the rounded twin of float16."""
    return 2 if format_ == HALF else 1


def check_sizes(model: nn.Module, sizes_hw: Sequence[tuple[int, int]]) -> None:
    """Raise a `UserError` for an image (height and width in pixels) that is too small for the detector."""
    least = least_side(model)
    for height, width in sizes_hw:
        if min(height, width) < least:
            raise UserError(f"--image_size_hw {height} {width}: expected sides of at least {least} pixels")


def least_side(model: nn.Module) -> int:
    """Return the least side of an image in pixels: the smallest feature map needs two rows and columns."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        rows = model.features(torch.empty(1, 3, PROBE_SIDE, PROBE_SIDE)).paddings[-1].shape[-2]
    return PROBE_SIDE // rows + 1


def trace(module: ExportModule, size_hw: tuple[int, int], least: int, form: GraphForm) -> ExportedProgram:
    """Export the module as a graph: for `size_hw` if the batch is fixed, else for images from `least` pixels up."""
    if form.batch_size is None:
        batch_size, (height, width) = 2, (max(side, 2 * least) for side in size_hw)
    else:
        batch_size, (height, width) = form.batch_size, size_hw
    inputs = [torch.zeros(batch_size, 3, height, width)]
    if form.with_mask:
        inputs.append(torch.zeros(batch_size, height, width, dtype=torch.bool))
    shapes = None if form.batch_size else dynamic_shapes(form.with_mask, least)
    sampling = sample_by_gather if form.by_gather else sample_in_pytorch
    with torch.no_grad(), without_operator(sampling), _quiet():
        return torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, strict=False)


def dynamic_shapes(with_mask: bool, least: int | None = None) -> dict[str, dict[int, Any]]:
    """Return the dynamic axes of the inputs: as dimensions from `least` up, or as names without `least`."""
    batch, height, width = "batch", "height", "width"
    if least is not None:
        batch, height, width = Dim(batch, min=1), Dim(height, min=least), Dim(width, min=least)
    shapes = {"images": {0: batch, 2: height, 3: width}}
    return {**shapes, "mask": {0: batch, 1: height, 2: width}} if with_mask else shapes


def to_onnx(
    program: ExportedProgram,
    module: ExportModule,
    form: GraphForm,
    metadata: Mapping[str, str],
    *,
    in_half: bool = False,
) -> bytes:
    """Convert the program to the bytes of an ONNX file, in float32 or `in_half` (see `tools.export_half`).

    Raises:
        RuntimeError: see `tools.export_graph.check_graph`.
    """
    onnx = importlib.import_module("onnx")
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            optimize=False,  # `fold_constants` does
            opset_version=form.opset,
            input_names=names,
            output_names=module.output_names,
            dynamic_shapes=None if form.batch_size else dynamic_shapes("mask" in names),
        )
        fold_constants(exported.model)
    model = exported.model_proto
    check_graph(model, form.refused)
    if in_half:
        model = to_half(model)
    onnx.helper.set_model_props(model, dict(metadata))
    return model.SerializeToString()


def to_bytes(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """Convert the program to the bytes of a .pt2 file, with metadata as JSON in the extra file `metadata.json`."""
    stream = io.BytesIO()
    with _quiet():
        torch.export.save(program, stream, extra_files={"metadata.json": json.dumps(dict(metadata))})
    return stream.getvalue()


def onnx_runner(data: bytes, threads: int | None = None) -> Runner:
    """Return a function that runs the bytes of an ONNX file with onnxruntime on the CPU; None for all its threads."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
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
