"""What stands in the folder of an export after an error: nobody takes an older file for the new one."""

import json

import pytest
import torch

import export as script
from tests.pruning.tiny import tiny_detector
from tests.test_export import run_script, save
from tools import export_formats as exporting
from tools.export_check import Case
from tools.export_formats import ExportResult
from util.errors import UserError
from util.files import write_atomic

OLDER = b"of an earlier run"


@pytest.fixture
def words(tmp_path):
    """Words of an export to .pt2 in `tmp_path`, which has a file of each kind from before."""
    save(tmp_path / "dense.pth")
    for name in ("dense.onnx", "dense.pt2", "dense.int8.onnx", "export.json"):
        (tmp_path / name).write_bytes(OLDER)
    return ["--resume", tmp_path / "dense.pth", "--output_dir", tmp_path, "--format", "pt2"]


@pytest.fixture
def exports(monkeypatch):
    """An export without tracing, whose files differ from the detector by its `difference`."""

    def export(model, postprocess, paths, *given, **more):
        results = [ExportResult(path, 1.0, None, [Case((96, 128), 1, export.difference)]) for path in paths.values()]
        for result in results:
            if result.passed:
                write_atomic(result.path, lambda stream: stream.write(b"new"))
        return results

    export.difference = 1e-6
    monkeypatch.setattr(script, "export", export)
    return export


def test_a_refused_file_is_said_to_be_that_of_an_earlier_export(tmp_path, words, exports):
    exports.difference = 0.002
    with pytest.raises(SystemExit) as end:
        run_script(*words)
    assert str(end.value) == (
        f"error: {tmp_path / 'dense.pt2'}: found a difference above 0.001; not written, the file there is of an "
        "earlier export"
    )
    (entry,) = json.loads((tmp_path / "export.json").read_text())["files"]
    assert (entry["file"], entry["passed"]) == ("dense.pt2", False)
    (tmp_path / "dense.pt2").unlink()
    with pytest.raises(SystemExit, match=r"above 0\.001; not written$"):
        run_script(*words)


def test_files_that_an_export_does_not_replace_are_named(tmp_path, words, exports, capsys):
    run_script(*words)
    older = f"of an earlier export, not of this one: {tmp_path / 'dense.onnx'}, {tmp_path / 'dense.int8.onnx'}"
    assert older in capsys.readouterr().out
    for name in ("dense.onnx", "dense.int8.onnx"):
        (tmp_path / name).unlink()
    run_script(*words)
    assert "earlier export" not in capsys.readouterr().out


def test_export_json_is_of_the_new_files_when_timings_end_with_an_error(tmp_path, words, exports, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")

    def fail(*given):
        raise UserError("onnxruntime: found a difference")

    monkeypatch.setattr(script, "timings_of", fail)
    with pytest.raises(UserError, match="onnxruntime: found a difference"):
        run_script(*words[:-1], "onnx", "--timings")
    found = json.loads((tmp_path / "export.json").read_text())
    assert [entry["file"] for entry in found["files"]] == ["dense.onnx"] and found["timings"] == []
    assert (tmp_path / "dense.onnx").read_bytes() == b"new" and "dense.onnx" in capsys.readouterr().out


def run_by_hand(monkeypatch, fails_at=None):
    """Replace tracing and writing by the module itself."""

    def content(format_, program, module, *given):
        if format_ == fails_at:
            raise RuntimeError("no program")
        return b"new", [lambda inputs: dict(zip(module.output_names, module(**inputs), strict=True))]

    monkeypatch.setattr(exporting, "trace", lambda *given: None)
    monkeypatch.setattr(exporting, "_content", content)


def test_an_error_in_a_later_format_leaves_every_file_as_it_was(tmp_path, words, monkeypatch):
    pytest.importorskip("onnxscript")
    run_by_hand(monkeypatch, fails_at="pt2")
    with torch.no_grad(), pytest.raises(RuntimeError, match="no program"):
        run_script(*words[:-1], "onnx", "pt2")
    for name in ("dense.onnx", "dense.pt2", "export.json"):
        assert (tmp_path / name).read_bytes() == OLDER
    run_by_hand(monkeypatch)
    with torch.no_grad():
        run_script(*words[:-1], "onnx", "pt2")
    assert (tmp_path / "dense.onnx").read_bytes() == (tmp_path / "dense.pt2").read_bytes() == b"new"


@torch.no_grad()
def test_a_detector_in_training_is_exported_as_in_eval_mode_and_stays_in_training(tmp_path, monkeypatch):
    run_by_hand(monkeypatch)
    model, _, postprocessors = tiny_detector("--dropout 0.5", seed=1)
    model.train()
    model.backbone.eval()  # a mixture stays one
    before = [module.training for module in model.modules()]
    path = tmp_path / "a.pt2"
    (result,) = exporting.export(model, postprocessors["bbox"], {"pt2": path}, [(64, 64)])
    assert result.passed and path.exists() and len(result.cases) == 2
    assert [module.training for module in model.modules()] == before
