"""What `export.py` writes beside the plain files: fixed shapes, float16, timings."""

import json

import pytest
import torch

import export as script
from models.padding import PaddedImages, pad_images
from models.widths import Widths
from tests.pruning.tiny import VARIANTS, pictures, tiny_args, tiny_detector
from tests.test_export import SLIM, run_script, save
from tools import export_formats as exporting
from tools import export_timing
from tools.export_check import check_export
from tools.export_report import timings_table
from util.errors import UserError
from util.files import file_digest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_fixed_shapes_float16_detections_and_timings_of_dense_and_slim(tmp_path, monkeypatch):
    monkeypatch.setattr(export_timing, "has_openvino", lambda: False)
    model, postprocess = save(tmp_path / "slim.pth", cfgs=SLIM)
    one, half = run_script("--resume", tmp_path / "slim.pth", "--output_dir", tmp_path, "--format", "onnx",
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
    batch, padding, _ = pad_images([pictures(((60, 70),))[0][0], images[0]])
    run = exporting.onnx_runner(one.path.read_bytes())
    for given, mask in ((images, torch.zeros(1, 96, 128, dtype=torch.bool)), (batch[:1], padding[:1])):
        found = run({"images": given, "mask": mask})
        with torch.no_grad():
            (expected,) = postprocess(model(PaddedImages(given, mask)), torch.ones(1, 2))
        for key in ("scores", "labels", "boxes"):
            torch.testing.assert_close(found[key][0], expected[key], rtol=0, atol=1e-4)
    report = json.loads((tmp_path / "export.json").read_text())
    assert [entry["file"] for entry in report["files"]] == ["slim.onnx", "slim.fp16.onnx"]
    assert [entry["cases"][0]["tolerance"] for entry in report["files"]] == [1e-3, exporting.HALF_TOLERANCE]
    rows = {(row["runtime"], row["detector"]): row for row in report["timings"]}
    assert list(rows) == [(name, which) for which in ("full widths", "slim") for name in ("PyTorch", "onnxruntime")]
    assert all(row["milliseconds"] > 0 and row["image_size_hw"] == [96, 128] for row in rows.values())
    assert rows["onnxruntime", "full widths"]["speed_up"] == 1
    assert report["checkpoint"] == {"file": "slim.pth", "sha256": file_digest(tmp_path / "slim.pth")}
    assert report["widths"] == model.widths_in("detector").to_list()


def test_a_ratio_of_times_is_the_median_over_turns_in_the_same_runtime(monkeypatch):
    seconds = {"a dense": [1.0, 4.0, 1.0], "a slim": [0.5, 1.0, 1.0], "b slim": [2.0, 2.0, 3.0]}
    monkeypatch.setattr(export_timing, "seconds_side_by_side", lambda calls, device, **options: seconds)
    calls = {("a", "dense"): None, ("a", "slim"): None, ("b", "slim"): None}
    rows = {(row["runtime"], row["detector"]): row for row in export_timing.time_calls(calls, 3, "dense")}
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


def test_a_slim_detector_is_compared_with_as_many_layers_and_queries_and_the_table_says_so(monkeypatch):
    given = {}
    monkeypatch.setattr(script, "runtime_calls", lambda detectors, *rest: given.update(detectors))
    monkeypatch.setattr(script, "time_calls", lambda calls, rounds, baseline: [])
    network = "--dec_layers 1 --num_queries 3"
    options = script.ExportOptions.from_values(vars(tiny_args(network, cfgs := SLIM.first_layers(1))))
    options = options.with_values({"cfgs": cfgs, "num_classes": 7})
    slim = tiny_detector(network, cfgs)[0]
    script.timings_of(options, slim, (64, 64), exporting.GraphForm(), lambda stage: None)
    full = given["full widths"]
    assert list(given) == ["full widths", "slim"] and given["slim"] is slim
    assert full.widths == Widths.dense(1, 1, 32, 32) and full.num_queries == slim.num_queries == 3
    row = {"runtime": "PyTorch", "milliseconds": 8.0, "speed_up": 1.0, "images": 2, "image_size_hw": [64, 80]}
    text = timings_table([{**row, "detector": "full widths"}, {**row, "detector": "slim"}])
    assert "dense" not in text and "times as fast as full widths" in text
    assert "2 x 64 x 80, no mask, one CPU thread; full widths: as many layers and queries, no module narrower" in text
    assert "as many layers" not in timings_table([{**row, "detector": "full widths"}])


def test_a_single_padded_image_is_checked(tmp_path):
    model, _, postprocessors = tiny_detector(seed=1)
    model.eval()
    seen = []

    def run(inputs, ignores_mask_of=()):
        images, mask = inputs["images"], inputs["mask"]
        seen.append((tuple(mask.shape), int(mask.sum())))
        with torch.no_grad():
            return model(PaddedImages(images, mask & (len(images) not in ignores_mask_of)))

    def differences(sizes, **wrong):
        cases = check_export(
            lambda inputs: run(inputs, **wrong), model, postprocessors["bbox"], [(96, 80)], sizes, with_mask=True
        )
        return [case.difference for case in cases]

    assert max(differences((1, 6))) < 1e-5
    assert [of_batch[0][0] for of_batch in seen] == [1, 1, 6]
    assert [padded > 0 for _, padded in seen] == [False, True, True]
    alone, together = differences((1, 3), ignores_mask_of=[1])
    assert alone > 1e-3 > 1e-5 > together
    assert differences((3,), ignores_mask_of=[3])[0] > 1e-3


@pytest.mark.soak
def test_every_fixed_form_of_the_deformable_variant_takes_a_mask(tmp_path):
    save(tmp_path / "a.pth", VARIANTS["deformable"])
    results = run_script("--resume", tmp_path / "a.pth", "--output_dir", tmp_path, "--static", "--fp16")
    assert [result.path.name for result in results] == ["a.onnx", "a.fp16.onnx", "a.pt2"]
    assert all(result.passed and [case.batch_size for case in result.cases] == [1] for result in results)


def test_options_that_only_onnx_uses_are_refused_without_it(tmp_path):
    with pytest.raises(UserError, match=r"--target, --fp16: found --format pt2, expected onnx"):
        run_script("--resume", "x", "--output_dir", tmp_path, "--format", "pt2", "--fp16", "--target", "tensorrt")
    assert script.GraphForm(by_gather=True).refused == {"GridSample", "BatchNormalization"}
