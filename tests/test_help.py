"""--help of the scripts and `make help`: groups, units, one mention of each default, an example; all targets."""

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import export
import inference
import main
import prune_greedy
import prune_greedy_ad
from main import get_args_parser
from pruning.schedule import GP, MGP
from runs.search_command import get_pruning_parser
from util.cli import script_parser

ROOT = Path(main.__file__).parent
PARSERS = {
    "main.py": lambda: script_parser(main.__doc__, parents=[get_args_parser()]),
    "prune_greedy.py": lambda: get_pruning_parser(GP, prune_greedy.__doc__),
    "prune_greedy_ad.py": lambda: get_pruning_parser(MGP, prune_greedy_ad.__doc__),
    "inference.py": inference.get_inference_parser,
    "export.py": export.get_export_parser,
}
PATHS = ("FILE", "FOLDER", "TEACHER", "IMAGES", "('DENSE', 'SLIM')")
THEMES = {
    "run": {"output_dir", "resume", "eval", "device", "amp", "seed"},
    "data": {"coco_path", "batch_size", "num_workers", "image_size"},
    "log": {"print_freq", "tensorboard"},
    "denoising and losses": {"use_dn", "scalar", "focal_alpha"},
    "training": {"epochs", "lr", "augmentation", "eval_every"},
    "distillation": {"distill", "distill_memory_coef"},
}


@pytest.fixture(params=PARSERS)
def script(request) -> tuple[str, argparse.ArgumentParser]:
    """Name and parser of a script."""
    return request.param, PARSERS[request.param]()


def test_help_has_an_example_and_each_default_once(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")
    name, parser = script
    text = parser.format_help()
    lines = re.sub(r"\n {20,}", "  ", text).splitlines()
    examples = text.partition("\nexamples:\n")[2].strip().splitlines()
    assert examples and all(re.match(rf"\s*(python|torchrun .*) {re.escape(name)} ", line) for line in examples)
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or not action.option_strings:
            continue
        shown = next(line for line in lines if re.match(rf"  .*{action.option_strings[-1]}\b.*  ", line))
        if action.default not in (None, False, argparse.SUPPRESS):
            assert shown.count("(default: ") == 1 and f"(default: {action.default})" in shown, shown
        assert "None" not in shown and "False" not in shown, shown


def test_examples_are_command_lines_that_the_script_takes(script):
    name, parser = script
    for line in (line.strip() for line in parser.epilog.splitlines()[1:]):
        words = line.partition(name)[2].replace("[", "").replace("]", "").replace('"', "").split()
        parser.parse_args(words)


def test_a_path_may_begin_with_the_home_folder(script, monkeypatch):
    """Shells leave the `~` of `--output_dir=~/x` alone."""
    monkeypatch.setenv("HOME", "/home/me")
    _, parser = script
    paths = {action for action in parser._actions if str(action.metavar) in PATHS}
    assert {"output_dir", "resume"} <= {action.dest for action in paths}
    for action in paths:
        read = parser._get_values(action, ["~/x"] * (action.nargs if isinstance(action.nargs, int) else 1))
        assert read in ("/home/me/x", ["/home/me/x"], ["/home/me/x"] * 2), action.dest


def test_options_stand_under_their_theme():
    groups = {
        group.title: {action.dest for action in group._group_actions} for group in get_args_parser()._action_groups
    }
    for title, names in THEMES.items():
        assert names <= groups[title]
    grouped = [name for names in groups.values() for name in names]
    assert len(grouped) == len(set(grouped)) and not groups["options"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert sorted(re.findall(r"^make (\S+)  +\S", listed, re.MULTILINE)) == sorted(targets)
