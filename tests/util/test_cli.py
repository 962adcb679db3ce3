"""Options as dataclass fields: parsers, typed options, and invalid values."""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from datasets.config import DataConfig
from export import ExportConfig, ExportOptions, get_export_parser
from inference import get_inference_parser
from main import get_args_parser
from models.config import LossConfig, NetworkConfig, TrainedDetectorConfig
from models.widths import Widths
from runs.config import DeviceConfig, MainConfig, SearchOptions, TrainingOptions
from tools.prediction import PredictionConfig, PredictionOptions
from util.cli import add_options, options_of, parse, script_parser
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {ExportConfig: ExportOptions, PredictionConfig: PredictionOptions}


def test_typed_options_are_separate_from_defaults():
    parser = argparse.ArgumentParser()
    parser.add_argument("images", nargs="+")
    parser.add_argument("--size", type=int, action="append", nargs=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--fast", action="store_true")
    args, typed = parse(parser, ["a", "b", "--size", "1", "2", "--size", "3", "4"])
    assert vars(args) == {"images": ["a", "b"], "size": [[1, 2], [3, 4]], "seed": 7, "fast": False}
    assert typed == {"images", "size"}
    assert parse(parser, ["a", "--seed", "7", "--fast"])[1] == {"images", "seed", "fast"}


def test_a_scripts_defaults_are_in_its_help_and_its_values():
    parser = script_parser("a test")
    add_options(parser, LossConfig, focal_alpha=0.5)
    assert parse(parser, [])[0].focal_alpha == 0.5 and "(default: 0.5)" in parser.format_help()


@pytest.mark.parametrize(
    ("config", "name", "value", "expected"),
    [
        (NetworkConfig, "enc_layers", 0, "a whole number from 1 up"),
        (NetworkConfig, "enc_layers", 2.0, "a whole number"),
        (NetworkConfig, "enc_layers", True, "a whole number"),
        (NetworkConfig, "enc_layers", None, "a whole number"),
        pytest.param(NetworkConfig, "enc_layers", 10**5000, "a whole number", id="a long number"),
        (NetworkConfig, "backbone", "vgg", "one of resnet18, "),
        (NetworkConfig, "backbone", ["resnet18"], "one of resnet18, "),
        (NetworkConfig, "dilation", 1, "True or False"),
        (LossConfig, "focal_alpha", float("nan"), r"a number in \[0, 1\]"),
        (LossConfig, "focal_alpha", "0.5", "a number"),
        (DataConfig, "coco_path", None, "text"),
        (DataConfig, "val_json", 5, "text"),
        (MainConfig, "finetune_ignore", ["a", 5], "a list, each text"),
        (MainConfig, "finetune_ignore", "class_embed", "a list, each text"),
        (MainConfig, "amp", "fp8", "one of off, "),
        (ExportConfig, "format", ["onnx", "tflite"], "a list, each one of onnx, pt2"),
        (ExportConfig, "format", "onnx", "a list, each one of onnx, pt2"),
        (ExportConfig, "image_size_hw", [[96, 0]], "a list, each a list of 2, each a whole number from 1 to 4096"),
        (ExportConfig, "image_size_hw", [[96]], "a list, each a list of 2"),
        (ExportConfig, "image_size_hw", [96, 96], "a list, each a list of 2, each a whole number"),
        (PredictionConfig, "inputs", "a.jpg", "a list, each text"),
    ],
)
def test_an_invalid_stored_value_is_an_error_with_file_and_key(config, name, value, expected):
    for make in (lambda: config(**{name: value}), lambda: dataclasses.replace(config(), **{name: value})):
        with pytest.raises(UserError, match=rf"^found .* under `args\.{name}`, expected {expected}"):
            make()
    for options in (config, OPTIONS.get(config, TrainingOptions)):
        with pytest.raises(UserError, match=rf"^a\.pth: found .* under `args\.{name}`, expected {expected}"):
            options.from_values({name: value}, "a.pth")


def test_every_default_is_valid():
    assert TrainingOptions.from_values(TrainingOptions().values()) == TrainingOptions()
    assert SearchOptions.from_values(SearchOptions().values()) == SearchOptions()


def test_values_are_assigned_to_their_group():
    options = TrainingOptions().with_values({"lr": 2, "enc_layers": 1, "num_classes": 4, "unknown": 5})
    assert (options.training.lr, options.detector.enc_layers, options.detector.num_classes) == (2, 1, 4)
    assert "unknown" not in options.values() and options.values()["lr"] == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.training.lr = 3


def test_widths_are_read_from_every_form_of_the_option():
    nested = [[[152, 416]], [[8, 8, 8]]]
    for given in (nested, str(nested), str(nested).split(), Widths.parse(nested)):
        assert TrainedDetectorConfig(cfgs=given).cfgs == Widths.parse(nested)
    with pytest.raises(UserError, match="--cfgs: found no JSON"):
        TrainedDetectorConfig(cfgs="[[")


def test_one_option_has_one_definition():
    scripts = (
        (get_args_parser(), (TrainingOptions,)),
        (get_inference_parser(), (DeviceConfig, PredictionOptions)),
        (get_export_parser(), (ExportOptions,)),
    )
    for parser, configs in scripts:
        names = {action.dest for action in parser._actions} - {"help"}
        assert names == set(options_of(*configs))
    assert {field.metadata["stored"] for field in options_of(TrainingOptions).values()} == {
        "network", "preferred", "training", "run"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "words", "found"),
    [
        ("weights.strip_optimizer", "a.pth", "the following arguments are required: OUT"),
        ("datasets.check", "set --num_workers -1", "-1: expected a whole number from 0 up"),
        ("datasets.demo", "set --images 0", "0: expected a whole number from 1 up"),
        ("reports", "", "the following arguments are required: OUTPUT_DIR"),
        ("tools.cost", "--image-size 0 1", "0: expected a whole number from 1 up"),
    ],
)
def test_a_wrong_option_of_a_command_is_a_one_line_error(module, words, found):
    done = subprocess.run(
        [sys.executable, "-m", module, *words.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and found in line and line.endswith("; see --help")
