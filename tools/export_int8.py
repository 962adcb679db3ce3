"""Post-training quantisation of ONNX files to INT8 by onnxruntime, judged by AP on the validation images.

INT8 can cost a detector much of its AP, and where the CPU has no fast INT8 kernels it saves no time. So AP and
milliseconds are measured beside those of float32 and bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

import engine
from datasets.coco import CocoLoader, build_dataset, build_loader, split_of
from datasets.coco_eval import GroundTruth
from datasets.config import DataConfig
from models.detector import Detector
from models.folding import folded_copy
from models.padding import group_by_size
from models.post_process import PostProcess
from tools.export_check import Runner
from tools.export_formats import onnx_runner
from tools.export_timing import one_thread
from util.errors import UserError
from util.phases import CALIBRATION, EVALUATION, TIMINGS, phase, timed
from util.timing import seconds_side_by_side

CPU = torch.device("cpu")
TIMED_ROUNDS = 5
CALIBRATION_IMAGES = 128  # of train2017
EVALUATED_IMAGES = 500  # of val2017, at most
MAX_AP_LOSS = 1.0  # points
LEAST_AP = 0.05  # in float32
GROUPS = ("heads", "decoder", "encoder", "convolutions")
HEADS = ("class_embed", "bbox_embed", "decoder.ref_point_head", "decoder.ref_anchor_head", "decoder.query_scale")
LAYERS = ("Conv", "MatMul")  # ONNX operators
INT8_SUFFIX = "int8.onnx"
SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's metadata of a node


@dataclass(frozen=True)
class Int8Trial:
    """A quantised detector: its groups of layers in float32, its AP in [0, 1] and the bytes of the file."""

    in_float: tuple[str, ...]
    ap: float
    data: bytes

    @property
    def precision(self) -> str:
        """The precision in words."""
        return precision_of(self.in_float)


@dataclass(frozen=True)
class Int8Result:
    """The quantised forms that were tried, and what they are compared with.

    Attributes:
        float_ap: AP in [0, 1] of the file in float32.
        trials: forms in the order in which they were tried; the first is the one asked for.
        calibration_images: number of images of train2017 that gave the ranges.
        images: number of images of val2017 that AP is of.
        max_ap_loss: the fall of AP in points up to which a form is good.
        rows: AP and milliseconds of an image by runtime and precision, of the form asked for and of the best one.
    """

    float_ap: float
    trials: list[Int8Trial]
    calibration_images: int
    images: int
    max_ap_loss: float
    rows: list[dict[str, Any]]

    @property
    def figures(self) -> dict[str, Any]:
        """What a report needs, for JSON."""
        return {
            "is_good": self.is_good,
            "calibration_images": self.calibration_images,
            "images": self.images,
            "max_ap_loss": self.max_ap_loss,
            "float_ap": self.float_ap,
            "trials": [{"in_float": list(trial.in_float), "ap": trial.ap} for trial in self.trials],
            "rows": self.rows,
        }

    @property
    def best(self) -> Int8Trial:
        """The form of the highest AP: the last one, unless all lose too much."""
        return best_of(self.trials)

    @property
    def is_good(self) -> bool:
        """Whether the form asked for loses little."""
        return holds(self.trials[0], self.float_ap, self.max_ap_loss)

    @property
    def refusal(self) -> str:
        """A sentence that says why the form asked for is not written, and which layers to keep in float32."""
        asked, best = self.trials[0], self.best
        before, after = (f"{100 * ap:.2f}" for ap in (self.float_ap, asked.ap))
        limit = f"--max_ap_loss {self.max_ap_loss:g}"
        found = f"AP falls from {before} to {after} on {self.images} images, by more than {limit}"
        if holds(best, self.float_ap, self.max_ap_loss):
            return f"{found}; --int8_float {' '.join(best.in_float)} has {100 * best.ap:.2f}"
        if best is asked:
            return f"{found}; without --int8_float, the layers to keep in float32 are searched for"
        return f"{found}, and to {100 * best.ap:.2f} with {' '.join(best.in_float)} in float32, the best form"


def precision_of(in_float: Sequence[str]) -> str:
    """Return the precision of a quantised file in words."""
    return f"INT8, {' '.join(in_float)} in float32" if in_float else "INT8"


def int8_path(onnx_path: Path) -> Path:
    """Return the path of the INT8 file beside an ONNX file in float32."""
    return onnx_path.with_suffix(f".{INT8_SUFFIX}")


def holds(trial: Int8Trial, float_ap: float, max_ap_loss: float) -> bool:
    """Return whether a form's AP is at most `max_ap_loss` points below that of float32."""
    return trial.ap >= float_ap - max_ap_loss / 100


def best_of(trials: Sequence[Int8Trial]) -> Int8Trial:
    """Return the form of the highest AP."""
    return max(trials, key=lambda trial: trial.ap)


def export_int8(
    data: bytes,
    model: Detector,
    postprocess: PostProcess,
    config: DataConfig,
    in_float: Sequence[str] | None,
    *,
    with_mask: bool,
    calibration_images: int = CALIBRATION_IMAGES,
    images: int = EVALUATED_IMAGES,
    max_ap_loss: float = MAX_AP_LOSS,
) -> Int8Result:
    """Quantise an ONNX file and compare AP and time on val2017 with those in float32 and bfloat16.

    Args:
        data: bytes of the file in float32, of the detector `model`; it takes batches and images of any size.
        config: data set; the first images of train2017 are for calibration.
        in_float, max_ap_loss: see `try_forms`.
        with_mask: the file takes a padding mask.
        calibration_images, images: greatest numbers of images to calibrate and to compute AP on.

    Raises:
        UserError: AP in float32 is too low to compare with.
    """
    folded = folded_copy(model)
    for_ranges, loader = first_images("train2017", config, calibration_images), first_images("val2017", config, images)
    truth = GroundTruth(split_of(config, "val2017").annotation_file)

    def ap_of(predict: Callable[[Any], dict[str, Any]], amp: str = "off") -> float:
        with phase(EVALUATION, len(loader.given)):
            return float(engine.evaluate(predict, postprocess, loader, truth, device=CPU, amp=amp).stats["AP"])

    def runner_of(content: bytes, threads: int) -> Callable[[list[Tensor]], dict[str, Tensor]]:
        return predictor(onnx_runner(content, threads), with_mask)

    threads = torch.get_num_threads()
    float_ap = ap_of(runner_of(data, threads))
    if not float_ap >= LEAST_AP:
        raise UserError(
            f"{split_of(config, 'val2017').annotation_file}: found AP {100 * float_ap:.1f} in float32, expected at "
            f"least {100 * LEAST_AP:.0f} for --int8, to see a fall; is this the detector's data set?"
        )
    trials = try_forms(
        data, _inputs_to_calibrate_on(for_ranges, with_mask), float_ap,
        lambda content: ap_of(runner_of(content, threads)), in_float, max_ap_loss,
    )  # fmt: skip
    shown = {trial.precision: trial for trial in (trials[0], best_of(trials))}
    precisions = {
        ("PyTorch", "float32"): (folded, ap_of(folded)),
        ("PyTorch", "bfloat16"): (_in_bfloat16(folded), ap_of(folded, "bf16")),
        ("onnxruntime", "float32"): (runner_of(data, 1), float_ap),
        **{("onnxruntime", name): (runner_of(trial.data, 1), trial.ap) for name, trial in shown.items()},
    }
    (first, *_), _ = next(iter(loader))
    milliseconds = _time({key: functools.partial(run, [first]) for key, (run, _) in precisions.items()})
    rows = [
        {"runtime": key[0], "precision": key[1], "ap": ap, "milliseconds": milliseconds[key]}
        for key, (_, ap) in precisions.items()
    ]
    return Int8Result(float_ap, trials, len(for_ranges.given), len(loader.given), max_ap_loss, rows)


def _in_bfloat16(detector: Detector) -> Callable[[list[Tensor]], dict[str, Any]]:
    def run(images: list[Tensor]) -> dict[str, Any]:
        with engine.autocast(CPU, "bf16"):
            return detector(images)

    return run


@torch.no_grad()
def _time(calls: dict[tuple[str, str], Callable[[], Any]]) -> dict[tuple[str, str], float]:
    """Return the median milliseconds of each call, in turns on one thread."""
    with one_thread(), phase(TIMINGS, TIMED_ROUNDS):
        seconds = seconds_side_by_side({" ".join(key): call for key, call in calls.items()}, CPU, rounds=TIMED_ROUNDS)
    return {key: 1000 * statistics.median(seconds[" ".join(key)]) for key in calls}


def _inputs_to_calibrate_on(loader: CocoLoader, with_mask: bool) -> Iterator[dict[str, Tensor]]:
    for images, _ in timed(loader, CALIBRATION, lambda batch: len(batch[1])):
        for group in group_by_size(images):
            yield inputs_of(group.batch, with_mask)


def first_images(split: str, config: DataConfig, count: int) -> CocoLoader:
    """Return a loader of the first images of a split."""
    dataset = build_dataset(split, config)
    chosen = Subset(dataset, range(min(count, len(dataset))))
    return build_loader(chosen, config.batch_size, shuffle=False, num_workers=config.num_workers)


def quantise(data: bytes, batches: Iterable[dict[str, Tensor]], in_float: Sequence[str], cache: Path) -> bytes:
    """Return an ONNX file whose convolutions and linear layers are INT8 (QDQ format, weights per channel).

    The products inside attentions stay float32, and so do the sums that linear layers give: boxes and scores need more
    than 256 levels.

    Args:
        data: bytes of the file in float32.
        batches: inputs to measure the ranges of activations on.
        in_float: names of `GROUPS` to leave in float32.
        cache: file for the ranges, read if it exists.
    """
    onnx, tools = importlib.import_module("onnx"), importlib.import_module("onnxruntime.quantization")
    model = onnx.load_model_from_string(data)
    chosen = {node.name for node, group in grouped_nodes(model) if group not in in_float}
    excluded = [node.name for node in model.graph.node if node.op_type in LAYERS and node.name not in chosen]

    class Reader(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs: Iterator[dict[str, Any]] = (
                {name: tensor.numpy() for name, tensor in inputs.items()} for inputs in batches
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self.inputs, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        tools.quantize_static(
            model, path, Reader(), per_channel=True, activation_type=tools.QuantType.QUInt8,
            op_types_to_quantize=[*LAYERS, "Relu", "MaxPool"], nodes_to_exclude=excluded,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]}, calibration_cache_path=cache,
        )  # fmt: skip
        quantised = onnx.load(path)
    _read_float_outside(quantised, chosen)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(quantised, {**facts, "precision": precision_of(in_float)})
    return quantised.SerializeToString()


def _read_float_outside(model: Any, chosen: Collection[str]) -> None:
    """Let all nodes but the chosen ones read tensors as they were before rounding to INT8, such as residual sums.

    onnxruntime gives all readers of a tensor the rounded one. Outputs of INT8 convolutions exist only rounded.
    """
    maker = {name: node for node in model.graph.node for name in node.output}
    exact: dict[str, str] = {}  # rounded tensor -> the tensor before
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in maker:
            before = maker[node.input[0]].input[0]
            source = maker.get(before)
            is_int8 = source is not None and (source.op_type == "MaxPool" or source.name in chosen)
            if not is_int8 or source.op_type == "MatMul":
                exact[node.output[0]] = before
    for node in model.graph.node:
        if node.name not in chosen and node.op_type != "MaxPool":
            for place, name in enumerate(node.input):
                node.input[place] = exact.get(name, name)


def grouped_nodes(model: Any) -> list[tuple[Any, str]]:
    """Return the convolutions and linear layers of an exported ONNX model with the group of each.

    Groups are those of `GROUPS`.
    """
    weights = {weight.name for weight in model.graph.initializer}
    found, stack = [], "encoder"
    for node in model.graph.node:
        scopes = " ".join(entry.value for entry in node.metadata_props if entry.key == SCOPES)
        # The packed projections of a self-attention are no module of their own, and belong where they stand.
        stack = "decoder" if ".decoder." in scopes else stack
        if node.op_type == "Conv":
            found.append((node, "convolutions"))
        elif node.op_type == "MatMul" and node.input[1] in weights:
            found.append((node, "heads" if any(head in scopes for head in HEADS) else stack))
    return found


def try_forms(
    data: bytes,
    batches: Iterable[dict[str, Tensor]],
    float_ap: float,
    ap_of: Callable[[bytes], float],
    in_float: Sequence[str] | None,
    max_ap_loss: float = MAX_AP_LOSS,
) -> list[Int8Trial]:
    """Quantise all groups of layers, and then fewer and fewer of them, until AP falls by little.

    If all groups lose too much, each one alone is left in float. If that is not enough either, those that cost most
    are left in float together.

    Args:
        data: bytes of the file in float32, of AP `float_ap` in [0, 1].
        batches: inputs to calibrate on, read once.
        ap_of: computes the AP of a file.
        in_float: groups to leave in float; these alone are tried. None for the ones that this function finds.
        max_ap_loss: the fall of AP in points up to which a form is good.

    Returns:
        The forms in the order in which they were tried. If one holds its AP, it is the last.
    """
    trials: list[Int8Trial] = []
    with tempfile.TemporaryDirectory() as folder:

        def holds_with(groups: Sequence[str]) -> bool:
            ordered = tuple(group for group in GROUPS if group in groups)
            with phase(CALIBRATION):
                quantised = quantise(data, batches, ordered, Path(folder) / "ranges.json")
            trials.append(Int8Trial(ordered, ap_of(quantised), quantised))
            return holds(trials[-1], float_ap, max_ap_loss)

        if in_float is not None:
            holds_with(in_float)
        elif not holds_with(()) and not any(holds_with([group]) for group in GROUPS):
            alone = sorted(trials[1:], key=lambda trial: -trial.ap)
            worst = [trial.in_float[0] for trial in alone]
            any(holds_with(worst[:count]) for count in range(2, len(GROUPS)))
    return trials


def most_trials(in_float: Sequence[str] | None) -> int:
    """Return how many forms `try_forms` tries at most."""
    return 1 if in_float is not None else 1 + len(GROUPS) + len(range(2, len(GROUPS)))


def predictor(run: Runner, with_mask: bool) -> Callable[[list[Tensor]], dict[str, Tensor]]:
    """Return a function from images (each 3 x H x W) to outputs, as a detector in eval mode gives them.

    Args:
        run: the exported detector, which takes batches of any size.
        with_mask: it takes a padding mask.
    """

    def predict(images: list[Tensor]) -> dict[str, Tensor]:
        found: dict[int, dict[str, Tensor]] = {}
        for group in group_by_size(images):
            outputs = run(inputs_of(group.batch, with_mask))
            found |= {place: {k: v[i] for k, v in outputs.items()} for i, place in enumerate(group.places)}
        return {key: torch.stack([found[i][key] for i in range(len(images))]) for key in ("pred_logits", "pred_boxes")}

    return predict


def inputs_of(images: Tensor, with_mask: bool) -> dict[str, Tensor]:
    """Return the inputs of an exported detector for images without padding, B x 3 x H x W."""
    count, _, height, width = images.shape
    return {"images": images, **({"mask": torch.zeros(count, height, width, dtype=torch.bool)} if with_mask else {})}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the advice of onnxruntime's quantisation."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
