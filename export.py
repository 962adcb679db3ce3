"""Export a detector to ONNX and torch.export, and check both files against the detector.

    python export.py --resume CKPT --output_dir out
    python export.py --resume out/pruned.pth --output_dir out --format onnx --detections --image_size_hw 480 640
    python export.py --resume out/pruned.pth --output_dir out --format onnx --target tensorrt --static

The files are OUT/NAME.onnx and OUT/NAME.pt2, named after the checkpoint. Inputs: `images` B x 3 x H x W (float32, RGB
in [0, 1], normalised by the mean and std in the metadata) and `mask` B x H x W (bool, True on padding; --no-mask omits
it, which is faster if no image is padded). Outputs: `pred_logits` B x Q x C (one sigmoid per class) and `pred_boxes`
B x Q x 4 (centre x, centre y, width, height, in [0, 1] of the unpadded image). Batch, height and width are dynamic
unless `--static` fixes them.
Images of one size give the boxes of `main.py` and `inference.py`; the boxes of padded images differ slightly, because
the convolutions see the padding.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets.coco import split_of
from datasets.config import DataConfig
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from models import build
from models.config import NETWORK_TITLE, DetectorConfig
from models.detector import Detector
from models.post_process import PostProcess
from runs.config import FolderConfig
from runs.export_plan import PlannedExport, plan_export
from tools.export_check import TOLERANCE
from tools.export_formats import (
    FORMATS,
    GREATEST_OPSET,
    GREATEST_SIDE,
    HALF,
    LEAST_OPSET,
    SUFFIXES,
    ExportResult,
    GraphForm,
    check_sizes,
    export,
    require_packages,
)
from tools.export_int8 import GROUPS, MAX_AP_LOSS, Int8Result, export_int8, int8_path
from tools.export_report import (
    FULL,
    SLIM,
    SUMMARY_NAME,
    int8_table,
    older_files,
    results_table,
    summary_of,
    timings_table,
)
from tools.export_timing import runtime_calls, time_calls
from util.cli import (
    Config,
    add_groups,
    group,
    option,
    options_from_python,
    options_of,
    parse,
    real,
    refuse,
    script_parser,
    whole,
)
from util.errors import UserError, run_cli
from util.files import check_output_dir, write_atomic, write_json
from util.lock import check_unlocked, hold_folder
from util.logging import bar_off, get_logger
from util.phases import PhaseClock
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint
from weights.decoder_layers import with_typed_layers
from weights.formats import Checkpoint
from weights.huggingface import INDEX_SUFFIX

TARGETS = ("any", "tensorrt")
SAMPLINGS = ("gridsample", "gather")


@dataclass(frozen=True)
class ExportConfig(Config):
    """Options of an export and its check."""

    format: Sequence[str] = option(FORMATS, "formats to write", nargs="+", choices=FORMATS, stored="run")
    target: str = option("any", "runtime to write ONNX for; tensorrt: with --sampling gather", choices=TARGETS,
        stored="run")  # fmt: skip
    sampling: str | None = option(None, "how the deformable variant's graph samples feature maps: by GridSample, or by "
        "reading pixels and interpolating (by default for TensorRT, which can be wrong at GridSample)",
        choices=SAMPLINGS, stored="run")  # fmt: skip
    static: int | None = option(None, "fix the batch to N images (1 if omitted) and their size to --image_size_hw",
        type=whole(1), nargs="?", const=1, stored="run")  # fmt: skip
    image_size_hw: Sequence[Sequence[int]] | None = option(None, type=whole(1, at_most=GREATEST_SIDE), nargs=2,
        action="append", metavar=("HEIGHT", "WIDTH"), stored="run", help="image size in pixels for the check, "
        "repeatable; by default the checkpoint's image size by 4/3 of it and, without --static, 3/4 of it square; "
        f"sides up to {GREATEST_SIDE}")  # fmt: skip
    opset: int = option(LEAST_OPSET, type=whole(LEAST_OPSET, at_most=GREATEST_OPSET), help="ONNX opset, up "
        f"to {GREATEST_OPSET}")  # fmt: skip
    mask: bool = option(True, "add the padding mask as a second input")
    fp16: bool = option(False, "also write NAME.fp16.onnx, with float16 weights and sums; coordinates stay float32")
    int8: bool = option(False, "also write NAME.int8.onnx, with INT8 convolutions and linear layers, calibrated on the "
        "first images of train2017, unless AP on val2017 falls by more than --max_ap_loss")  # fmt: skip
    int8_float: Sequence[str] | None = option(None, "groups of layers that --int8 leaves in float32", nargs="+",
        choices=GROUPS, stored="run")  # fmt: skip
    max_ap_loss: float = option(MAX_AP_LOSS, "AP points that --int8 may lose", type=real(0, at_most=100), stored="run")
    timings: int | None = option(None, "time PyTorch, onnxruntime and, if installed, OpenVINO in N turns (5 if "
        "omitted), the detector and its full widths, one CPU thread", type=whole(1), nargs="?", const=5,
        stored="run")  # fmt: skip
    detections: bool = option(False, help="also output the --num_select best pairs of query and class per image, "
        "best first: scores, labels (category ids) and boxes (x0, y0, x1, y1 in [0, 1] of the image)")  # fmt: skip


@dataclass(frozen=True)
class ExportOptions(Config):
    """All options of export.py; the image size comes from the checkpoint."""

    run: FolderConfig = group(FolderConfig, "run")
    detector: DetectorConfig = group(DetectorConfig, NETWORK_TITLE)
    data: DataConfig = group(DataConfig, "data, with --int8")
    export: ExportConfig = group(ExportConfig, "export")


def get_export_parser() -> argparse.ArgumentParser:
    """Return the parser: options of an export, and those of `main.py` that describe a checkpoint's network."""
    parser = script_parser(__doc__)
    add_groups(parser, ExportOptions)
    return parser


def main(args: argparse.Namespace, typed: Collection[str] = ()) -> list[ExportResult]:
    """Export with the options of `get_export_parser`; print a table of files and differences.

    Raises:
        UserError: options and checkpoint do not agree, or a package is missing.
        SystemExit: with code 1, if the outputs of a file differ from the detector's, or INT8 costs too much AP; that
            file is not written.
    """
    torch.set_flush_denormal(True)
    options = ExportOptions.from_values(vars(args))
    _refuse_unused(options, typed)
    asked, run = options.export, options.run
    if not run.resume:
        raise UserError("--resume: found none, expected the checkpoint of the detector to export")
    require_packages(asked.format)
    output_dir = check_output_dir(run.output_dir)
    checkpoint = with_typed_layers(read_checkpoint(run.resume), options.detector, typed)
    if checkpoint.remark:
        get_logger().info("%s", checkpoint.remark)
    options = options_for(options, checkpoint, typed)
    form, sizes_hw = form_of(options), checked_sizes_hw(options)
    for split in ("train2017", "val2017") if asked.int8 else ():
        split_of(options.data, split)
    model, _, postprocessors = build_detector(options.detector, checkpoint)
    check_sizes(model, sizes_hw)
    began, plan = time.time(), None
    if run.plan:
        check_unlocked(output_dir)
    if run.plan or asked.int8:
        plan = plan_export(model, planned_of(options, model, form, sizes_hw))
        get_logger().info("%s", plan.text())
    if run.plan:
        return []
    with hold_folder(output_dir), PhaseClock(torch.device("cpu")).running() as clock:
        results, int8 = _write_files(options, checkpoint, model, postprocessors["bbox"], form, sizes_hw)
        older = older_files(output_dir, stem_of(checkpoint), results, int8)
    if plan is not None:
        get_logger().info("%s", plan.compared(clock, time.time() - began))
    if older:
        get_logger().info("of an earlier export, not of this one: %s", ", ".join(map(str, older)))
    _end_if_refused(results, int8, older)
    return results


def stem_of(checkpoint: Checkpoint) -> str:
    """Return the name of the files without their suffixes."""
    return Path(checkpoint.path.name.removesuffix(INDEX_SUFFIX)).stem


def formats_of(asked: ExportConfig) -> list[str]:
    """Return the formats of the files, without INT8."""
    return [format_ for format_ in SUFFIXES if format_ in asked.format or (format_ == HALF and asked.fp16)]


def planned_of(
    options: ExportOptions, model: Detector, form: GraphForm, sizes_hw: Sequence[tuple[int, int]]
) -> PlannedExport:
    """Return what the export will do."""
    asked = options.export
    return PlannedExport(
        formats=formats_of(asked),
        sizes_hw=sizes_hw,
        form=form,
        output_dir=Path(options.run.output_dir),
        calibrated_on=options.data if asked.int8 else None,
        in_float=asked.int8_float,
        turns=asked.timings or 0,
        timed=[*detectors_to_time(options, model).values()] if asked.timings else [],
    )


def _write_files(
    options: ExportOptions, checkpoint: Checkpoint, model: Detector, postprocess: PostProcess, form: GraphForm,
    sizes_hw: Sequence[tuple[int, int]],
) -> tuple[list[ExportResult], Int8Result | None]:  # fmt: skip
    """Write and print files, INT8, times and export.json."""
    asked, output_dir = options.export, Path(options.run.output_dir)
    paths = {format_: output_dir / f"{stem_of(checkpoint)}.{SUFFIXES[format_]}" for format_ in formats_of(asked)}
    steps = 1 + asked.int8 + (asked.timings is not None) + len(paths) * (2 + len(sizes_hw) * len(form.batch_sizes))
    with tqdm(total=steps, disable=bar_off(), leave=False) as bar:

        def show(stage: str) -> None:
            bar.set_description(stage, refresh=False)
            bar.update()

        facts = metadata_of(options, model, checkpoint, sizes_hw)
        results = export(model, postprocess, paths, sizes_hw, form, metadata=facts, progress=show)
        # INT8 and timings may end with an error, after which the files above are there.
        write_json(output_dir / SUMMARY_NAME, summary := summary_of(checkpoint, model, results))
        get_logger().info("%s", results_table(results))
        int8 = None
        if asked.int8 and results[0].passed:
            show("quantising")
            int8 = write_int8(options, paths["onnx"], model, postprocess)
            write_json(output_dir / SUMMARY_NAME, summary := {**summary, "int8": int8.figures})
            get_logger().info("%s", int8_table(int8))
        if asked.timings is not None and results[0].passed:
            timings = timings_of(options, model, sizes_hw[0], form, show)
            write_json(output_dir / SUMMARY_NAME, {**summary, "timings": timings})
            get_logger().info("%s", timings_table(timings))
    return results, int8


def _end_if_refused(results: Sequence[ExportResult], int8: Int8Result | None, older: Collection[Path]) -> None:
    """Exit with code 1 if a file was not written, and say so if an older one has its name."""
    faults = {
        result.path: f"found a difference above {result.cases[0].tolerance:g}"
        for result in results
        if not result.passed
    }
    if int8 is not None and not int8.is_good:
        faults[int8_path(results[0].path)] = int8.refusal
    sentences = [
        f"{path}: {fault}; not written{', the file there is of an earlier export' if path in older else ''}"
        for path, fault in faults.items()
    ]
    if sentences:
        sys.exit(f"error: {'; '.join(sentences)}")


def run(**options: Any) -> list[ExportResult]:
    """Export from Python, with the options of the command line as keywords; return and raise as `main`."""
    return main(*options_from_python(options, ExportOptions))


def _refuse_unused(options: ExportOptions, typed: Collection[str]) -> None:
    """Raise a `UserError` for typed options that this export does not use."""
    asked = options.export
    if not asked.detections:
        refuse(["num_select"], typed, "found no --detections, without which it is not used")
    if "onnx" not in asked.format:
        unused = ["opset", "target", "fp16", "int8", "timings"]
        refuse(unused, typed, f"found --format {' '.join(asked.format)}, expected onnx, which alone uses it")
    if asked.int8 and asked.static is not None:
        raise UserError("--int8: found --static, expected one of them: calibration images have any size")
    if set(asked.int8_float or ()) == set(GROUPS):
        raise UserError(f"--int8_float: found all of {', '.join(GROUPS)}, expected some of them, or no --int8")
    if not asked.int8:
        refuse(
            ["int8_float", "max_ap_loss", *options_of(DataConfig)],
            typed,
            "found no --int8, without which it is not used",
        )


def form_of(options: ExportOptions) -> GraphForm:
    """Return the form of the graphs that the options ask for."""
    asked = options.export
    if asked.sampling and options.detector.modelname != "dn_dab_deformable_detr":
        raise UserError("--sampling: dn_dab_detr samples no feature maps, expected dn_dab_deformable_detr (-m)")
    return GraphForm(
        opset=asked.opset,
        with_mask=asked.mask,
        with_detections=asked.detections,
        by_gather=(asked.sampling or ("gather" if asked.target == "tensorrt" else "gridsample")) == "gather",
        batch_size=asked.static,
    )


def checked_sizes_hw(options: ExportOptions) -> list[tuple[int, int]]:
    """Return the image sizes to check; of a graph with fixed shapes, its size."""
    asked, short = options.export, options.data.image_size
    sizes_hw = [tuple(size) for size in asked.image_size_hw or ((short, short * 4 // 3), (short * 3 // 4,) * 2)]
    if asked.static is None:
        return sizes_hw
    if asked.image_size_hw is not None and len(sizes_hw) > 1:
        raise UserError(f"--static: found {len(sizes_hw)} sizes under --image_size_hw, expected one")
    return sizes_hw[:1]


def write_int8(options: ExportOptions, onnx_path: Path, model: Detector, postprocess: PostProcess) -> Int8Result:
    """Quantise the ONNX file of the detector; write the result if its AP falls by little; remove a former one."""
    asked, path = options.export, int8_path(onnx_path)
    path.unlink(missing_ok=True)
    data = onnx_path.read_bytes()
    found = export_int8(
        data, model, postprocess, options.data, asked.int8_float,
        with_mask=asked.mask, max_ap_loss=asked.max_ap_loss,
    )  # fmt: skip
    if found.is_good:
        write_atomic(path, lambda stream: stream.write(found.trials[0].data))
    return found


def detectors_to_time(options: ExportOptions, model: Detector) -> dict[str, Detector]:
    """Return the detector and, if it is slim, one of full widths.

    That one has random weights and as many layers and queries: a checkpoint does not tell how many its search began
    with.
    """
    full = build(dataclasses.replace(options.detector, cfgs=None))[0].eval()
    if full.widths_in("detector") == model.widths_in("detector"):
        return {FULL: model}
    return {FULL: full, SLIM: model}


def timings_of(
    options: ExportOptions, model: Detector, size_hw: tuple[int, int], form: GraphForm, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time `detectors_to_time`; see `tools.export_timing.time_calls`."""
    detectors = detectors_to_time(options, model)
    images = torch.randn(form.batch_size or 1, 3, *size_hw, generator=torch.Generator().manual_seed(0))
    form = dataclasses.replace(form, with_mask=False, with_detections=False)
    show("timing")
    calls = runtime_calls(detectors, images, form, TOLERANCE)
    setting = {"images": len(images), "image_size_hw": list(size_hw), "threads": 1}
    return [{**setting, **row} for row in time_calls(calls, options.export.timings or 1, FULL)]


def metadata_of(
    options: ExportOptions, model: torch.nn.Module, checkpoint: Checkpoint, sizes_hw: Sequence[tuple[int, int]]
) -> dict[str, str]:
    """Metadata of the files, each a text or JSON."""
    static = options.export.static
    names = checkpoint.categories
    return {
        **({"class_names": json.dumps(names)} if names else {}),
        "model": options.detector.modelname,
        "checkpoint": checkpoint.path.name,
        "num_classes": str(options.detector.num_classes),
        "widths": json.dumps(model.widths.to_list()),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "mask": "True on padding" if options.export.mask else "none",
        "batch": "any" if static is None else f"{static} x 3 x {sizes_hw[0][0]} x {sizes_hw[0][1]}",
    }


if __name__ == "__main__":
    command_line = get_export_parser()
    run_cli(lambda: main(*parse(command_line)) and None)
