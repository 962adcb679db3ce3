"""What `export.py` writes beside the plain files: fixed shapes, float16, timings."""

import json

import pytest
import torch

import export as script
from tests.pruning.tiny import pictures
from tests.test_export import SLIM, run_script, save
from tools import export_formats as exporting
from tools import export_timing
from util.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_fixed_shapes_float16_detections_and_timings_of_dense_and_slim(tmp_path, monkeypatch):
    monkeypatch.setattr(export_timing, "has_openvino", lambda: False)
    model, postprocess = save(tmp_path / "slim.pth", cfgs=SLIM)
    one, half = run_script("--resume", tmp_path / "slim.pth", "--output_dir", tmp_path, "--format", "onnx", "--no-mask",
                           "--static", "--detections", "--fp16", "--timings", 1)  # fmt: skip
    assert one.passed and half.passed and half.path.name == "slim.fp16.onnx"
    assert [(case.size_hw, case.batch_size) for case in one.cases] == [((96, 128), 1)]
    assert half.megabytes < 0.7 * one.megabytes
    graph = onnx.load(one.path)
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert facts["batch"] == "1 x 3 x 96 x 128" and facts["precision"] == "float32"
    axes = [axis.dim_value for axis in graph.graph.input[0].type.tensor_type.shape.dim]
    assert axes == [1, 3, 96, 128] and not any(node.op_type == "Shape" for node in graph.graph.node)
    images = torch.stack(pictures(((96, 128),))[0])
    found = exporting.onnx_runner(one.path.read_bytes())({"images": images})
    with torch.no_grad():
        (expected,) = postprocess(model(images), torch.ones(1, 2))
    for key in ("scores", "labels", "boxes"):
        torch.testing.assert_close(found[key][0], expected[key], rtol=0, atol=1e-4)
    report = json.loads((tmp_path / "export.json").read_text())
    assert [entry["file"] for entry in report["files"]] == ["slim.onnx", "slim.fp16.onnx"]
    assert [entry["cases"][0]["tolerance"] for entry in report["files"]] == [1e-3, exporting.HALF_TOLERANCE]
    rows = {(row["runtime"], row["detector"]): row for row in report["timings"]}
    assert list(rows) == [("PyTorch", "dense"), ("onnxruntime", "dense"), ("PyTorch", "slim"), ("onnxruntime", "slim")]
    assert all(row["milliseconds"] > 0 and row["image_size_hw"] == [96, 128] for row in rows.values())
    assert rows["onnxruntime", "dense"]["speed_up"] == 1


def test_a_ratio_of_times_is_the_median_over_turns_in_the_same_runtime(monkeypatch):
    seconds = {"a dense": [1.0, 4.0, 1.0], "a slim": [0.5, 1.0, 1.0], "b slim": [2.0, 2.0, 3.0]}
    monkeypatch.setattr(export_timing, "seconds_side_by_side", lambda calls, device, **options: seconds)
    calls = {("a", "dense"): None, ("a", "slim"): None, ("b", "slim"): None}
    rows = {(row["runtime"], row["detector"]): row for row in export_timing.time_calls(calls, 3)}
    assert rows["a", "slim"] == {"runtime": "a", "detector": "slim", "milliseconds": 1000.0, "speed_up": 2.0}
    assert "speed_up" not in rows["b", "slim"] and rows["b", "slim"]["milliseconds"] == 2000


def test_a_runtime_that_gives_other_outputs_is_not_timed(tmp_path, monkeypatch):
    model, _ = save(tmp_path / "dense.pth")
    monkeypatch.setattr(export_timing, "onnx_of", lambda *given: b"")
    monkeypatch.setattr(export_timing, "has_openvino", lambda: False)
    outputs = {"pred_logits": torch.zeros(1, 5, 7), "pred_boxes": torch.zeros(1, 5, 4)}
    monkeypatch.setattr(export_timing, "onnx_runner", lambda data, threads: lambda inputs: outputs)
    with pytest.raises(UserError, match=r"onnxruntime: found a difference of .* from PyTorch, expected 0.001"):
        export_timing.runtime_calls({"dense": model}, torch.zeros(1, 3, 64, 64), exporting.GraphForm(), 1e-3)


def test_openvino_gives_what_the_detector_gives(tmp_path):
    pytest.importorskip("openvino")
    model, _ = save(tmp_path / "slim.pth", cfgs=SLIM)
    form = exporting.GraphForm(with_mask=False, batch_size=1)
    images = torch.stack(pictures(((96, 64),))[0])
    found = export_timing.openvino_runner(export_timing.onnx_of(model, (96, 64), form))({"images": images})
    with torch.no_grad():
        expected = model(images)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-4)


def test_options_that_only_onnx_uses_are_refused_without_it(tmp_path):
    with pytest.raises(UserError, match=r"--target, --fp16: found --format pt2, expected onnx"):
        run_script("--resume", "x", "--output_dir", tmp_path, "--format", "pt2", "--fp16", "--target", "tensorrt")
    assert script.GraphForm(by_gather=True).refused == {"GridSample", "BatchNormalization"}
