"""The lines of docs/python.md run as printed, and scripts take options from Python as from the command line."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import export
import inference
import main
import prune_greedy
from models.widths import Widths
from runs.config import DeviceConfig, TrainingOptions
from tests.command_lines import ROOT
from tests.tiny_run import write_self_annotated
from tools.prediction import PredictionOptions
from util.cli import options_from_python, options_of, parse
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_lines_of_the_page_run_as_printed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    (code,) = BLOCK.findall((ROOT / "docs" / "python.md").read_text())
    root = write_self_annotated(tmp_path / "coco", "--dim_feedforward 512")  # most of its parameters can be cut
    for name, path in (("COCODIR", root), ("CKPT", root / "dense.pth")):
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(str(path)))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    found, out = names["found"], tmp_path / "out"
    pruned = read_checkpoint(out / "pruned.pth")
    assert found.path.resolve() == out / "pruned.pth" and found.widths == pruned.widths
    end = json.loads((out / "search.jsonl").read_text().splitlines()[-1])
    assert Widths.parse(end["widths"]) == found.widths
    assert json.loads((out / "search.jsonl").read_text().splitlines()[-2])["kept_fraction"] <= 0.5 + 1e-6
    assert names["metrics"]["AP"] == json.loads((out / "eval" / "eval.json").read_text())["AP"]
    assert names["file"].passed and (out / "pruned.onnx").is_file()
    assert names["slim"].model.widths == found.widths
    assert f"AP {names['metrics']['AP']:.4f} with the widths {found.widths}" in capsys.readouterr().out


@pytest.mark.parametrize("run", [main.run, export.run, inference.run, prune_greedy.run])
def test_an_unknown_option_is_an_error_that_names_a_close_one(run):
    with pytest.raises(UserError, match=r"'resum': found no such option, expected one of .*, such as resume$"):
        run(resum="a.pth")


def test_numbers_of_numpy_are_numbers(tmp_path):
    given = {"batch_size": np.int64(3), "lr": np.float32(0.5), "resume": tmp_path, "use_dn": np.bool_(False)}
    args, typed = options_from_python({**given, "train_json": [tmp_path]}, TrainingOptions)
    assert vars(args) == {"batch_size": 3, "lr": 0.5, "resume": str(tmp_path), "use_dn": False,
                          "train_json": [str(tmp_path)]}  # fmt: skip
    assert typed == {*vars(args)} and type(args.batch_size) is int and type(args.use_dn) is bool


PARSERS = {
    "main": (main.get_args_parser, (TrainingOptions,)),
    "inference": (inference.get_inference_parser, (DeviceConfig, PredictionOptions)),
    "export": (export.get_export_parser, (export.ExportOptions,)),
}


@pytest.mark.parametrize("script", PARSERS)
def test_paths_are_read_as_on_the_command_line(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    get_parser, configs = PARSERS[script]
    words, given = ["~/x"] if script == "inference" else [], {}
    for name, field in options_of(*configs).items():
        if field.metadata.get("type") is os.path.expanduser:
            count = field.metadata.get("nargs")
            many = [Path("~/x"), "~/x"] if count is not None else Path("~/x")
            given[name] = ["~/x"] if name == "inputs" else many
            words += [] if name == "inputs" else [f"--{name}", *["~/x"] * (1 if count is None else 2)]
    typed, _ = parse(get_parser(), words)
    found, _ = options_from_python(given, *configs)
    assert {"resume", "output_dir"} <= set(given) and "/home/me/x" in vars(found).values()
    assert vars(found) == {name: getattr(typed, name) for name in given}
    assert vars(options_from_python({"resume": "~/x"}, *configs)[0]) == {"resume": "/home/me/x"}
    assert vars(options_from_python({"modelname": "~/x"}, *configs)[0]) == {"modelname": "~/x"}  # no path


def test_values_are_checked_as_typed_ones(tmp_path):
    with pytest.raises(UserError, match=r"found 'many' under `args.batch_size`, expected a whole number"):
        main.run(batch_size="many", output_dir=tmp_path)
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        main.run(eval=True, resume=tmp_path / "none.pth", output_dir=tmp_path)
    with pytest.raises(UserError, match="--lr: found with --eval"):
        main.run(eval=True, lr=0.1, resume=tmp_path / "none.pth", output_dir=tmp_path)
