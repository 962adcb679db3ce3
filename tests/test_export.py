"""Exported detectors: one file for all sizes and batches, which needs none of this code, and never a wrong one."""

import json
import sys
from itertools import product

import pytest
import torch

import export as script
from models.dn_dab_deformable_detr.ops import sampling
from models.padding import PaddedImages, pad_images
from models.widths import Widths
from tests.pruning.tiny import VARIANTS, pictures, tiny_args, tiny_detector
from tests.soak import rest_in_soak
from tools import export_formats as exporting
from tools.export_check import Case, check_export, greatest_difference
from util.cli import parse
from util.errors import UserError
from weights.checkpoint_file import save_checkpoint

FULL = Widths.dense(1, 2, 32, 32)
SLIM = Widths.parse([[[16, 20]], [[8, 32, 16], [32, 4, 32]]])
# A deformable detector, and how many attentions to how many levels it has.
DEFORMABLE = {"small": (f"{VARIANTS['deformable']} --dec_layers 1 --num_feature_levels 2", 2, 2),
              "larger": (VARIANTS["deformable"], 3, 3)}  # fmt: skip


def run_script(*words):
    """`export.py` with these words and small images."""
    return script.main(*parse(script.get_export_parser(), ["--image_size_hw", "96", "128", *map(str, words)]))


def save(path, network="", cfgs=None, **more):
    """A tiny detector's checkpoint."""
    model, _, postprocessors = tiny_detector(network, cfgs, seed=1)
    arguments = vars(tiny_args(network, cfgs))
    content = {"widths": model.widths, "full_widths": FULL, "arguments": arguments, "num_classes": 7}
    save_checkpoint(path, **{**content, **more}, state_dict=model.state_dict())
    return model.eval(), postprocessors["bbox"]


def test_onnx_of_a_slim_detector_takes_other_sizes_and_batches_and_selects_detections(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    cfgs = Widths.parse([*SLIM.to_list(), [[5], [16], [9]]])
    model, postprocess = save(tmp_path / "slim.pth", "--return_layer layer3", cfgs=cfgs)
    (result,) = run_script("--resume", tmp_path / "slim.pth", "--output_dir", tmp_path, "--format", "onnx",
                           "--image_size_hw", "130", "97", "--detections")  # fmt: skip
    assert result.passed and [case.size_hw for case in result.cases] == [(96, 128)] * 2 + [(130, 97)] * 2
    data = (tmp_path / "slim.onnx").read_bytes()
    graph = onnx.load_model_from_string(data)
    onnx.checker.check_model(graph)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(facts["widths"]) == cfgs.to_list() and facts["opset"] == "18"
    shapes = [list(weight.dims) for weight in graph.graph.initializer]
    assert [5, 64, 3, 3] in shapes and [32, 9, 3, 3] in shapes  # the backbone is cut, too
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert axes == {
        "images": ["batch", 3, "height", "width"], "mask": ["batch", "height", "width"],
        "pred_logits": ["batch", 5, 7], "pred_boxes": ["batch", 5, 4],
        "scores": ["batch", 35], "labels": ["batch", 35], "boxes": ["batch", 35, 4],
    }  # fmt: skip
    images, _ = pictures(
        ((64, 160), (80, 70), (64, 64), (64, 65))
    )  # none of the sizes that it was made or checked with
    batch, padding, _ = pad_images(images)
    found = exporting.onnx_runner(data)({"images": batch, "mask": padding})
    with torch.no_grad():
        outputs = model(PaddedImages(batch, padding))
        expected = postprocess(outputs, torch.ones(4, 2))
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], outputs[key], rtol=0, atol=1e-4)
    for key in ("scores", "labels", "boxes"):
        torch.testing.assert_close(found[key], torch.stack([d[key] for d in expected]), rtol=0, atol=1e-4)


@pytest.mark.soak
def test_a_cut_backbone_is_exported_cut(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    cfgs = Widths.parse([*SLIM.to_list(), [[5, 64], [1, 128], [256, 99]]])
    save(tmp_path / "slim.pth", "--backbone resnet18 --return_layer layer3", cfgs=cfgs)
    (result,) = run_script("--resume", tmp_path / "slim.pth", "--output_dir", tmp_path, "--format", "onnx")
    assert result.passed and all(case.difference < 1e-4 for case in result.cases)
    graph = onnx.load(tmp_path / "slim.onnx")
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(facts["widths"]) == cfgs.to_list()
    shapes = [list(weight.dims) for weight in graph.graph.initializer]
    assert [5, 64, 3, 3] in shapes and [256, 99, 3, 3] in shapes


@pytest.mark.parametrize("network", rest_in_soak([*DEFORMABLE], ["small"]))
def test_a_deformable_searchs_output_is_cut_and_exported_without_the_operator(tmp_path, network):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    kept = {"encoder.0.ffn": {"hidden": torch.arange(20)}}
    words, attentions, levels = DEFORMABLE[network]
    full = Widths.dense(1, attentions - 1, 32, 32)
    save(tmp_path / "pruned.pth", words, kept=kept, full_widths=full, widths=full.replace("encoder.0.ffn", 20))
    before = sampling._compiled_for
    results = run_script("--resume", tmp_path / "pruned.pth", "--output_dir", tmp_path)
    assert sampling._compiled_for == before or before is None
    assert [(result.path.name, result.passed) for result in results] == [("pruned.onnx", True), ("pruned.pt2", True)]
    assert all(case.difference < 1e-4 for result in results for case in result.cases)
    graph = onnx.load(tmp_path / "pruned.onnx")
    assert sum(node.op_type == "GridSample" for node in graph.graph.node) == attentions * levels
    facts = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "pruned.pt2", extra_files=facts)
    assert json.loads(json.loads(facts["metadata.json"])["widths"])[0] == [[32, 20]]
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("dn_detr") for name in operators) and any("grid_sampler" in n for n in operators)


@pytest.fixture
def checkpoint(tmp_path):
    """Path of a dense detector's checkpoint, and the detector."""
    model, postprocess = save(tmp_path / "dense.pth")
    return tmp_path / "dense.pth", model, postprocess


def test_without_a_mask_images_alone_go_in(tmp_path, checkpoint):
    path, model, _ = checkpoint
    (result,) = run_script("--resume", path, "--output_dir", tmp_path, "--format", "pt2", "--no-mask")
    assert result.passed and result.opset is None
    images = torch.stack(pictures(((96, 64), (96, 64), (96, 64)))[0])
    with torch.no_grad():
        logits, boxes = torch.export.load(tmp_path / "dense.pt2").module()(images)
        expected = model(images)
    torch.testing.assert_close(logits, expected["pred_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(boxes, expected["pred_boxes"], rtol=0, atol=1e-4)


def test_a_file_that_computes_something_else_is_not_written_and_the_script_ends_with_1(
    tmp_path, checkpoint, monkeypatch, capsys
):
    path, _, _ = checkpoint
    (tmp_path / "dense.pt2").write_bytes(b"of an earlier run")
    real = exporting.program_runner

    def wrong(data, names):
        run = real(data, names)
        return lambda inputs: {name: value + 0.002 for name, value in run(inputs).items()}

    monkeypatch.setattr(exporting, "program_runner", wrong)
    with pytest.raises(SystemExit) as end:
        run_script("--resume", path, "--output_dir", tmp_path, "--format", "pt2")
    assert "dense.pt2: found a difference above 0.001" in str(end.value)  # sys.exit of a text is code 1
    assert "FAILED" in capsys.readouterr().out
    assert (tmp_path / "dense.pt2").read_bytes() == b"of an earlier run"
    assert not list(tmp_path.glob(".dense*"))


def test_the_check_finds_boxes_of_other_queries_wrong_labels_and_values_that_are_not_finite():
    model, _, postprocessors = tiny_detector(seed=1)
    model.eval()
    postprocess = postprocessors["bbox"]

    def run(inputs, change=lambda found: found):
        with torch.no_grad():
            outputs = model(inputs["images"])
            logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
            names = ("pred_logits", "pred_boxes", "scores", "labels", "boxes")
            return change(dict(zip(names, (logits, boxes, *postprocess.select(logits, boxes)), strict=True)))

    def difference(change):
        cases = check_export(lambda i: run(i, change), model, postprocess, [(64, 64)], with_mask=False)
        assert [case.batch_size for case in cases] == [1, 3]
        return [case.difference for case in cases]

    assert max(difference(lambda found: found)) < 1e-5
    assert min(difference(lambda found: {**found, "labels": found["labels"].flip(1)})) == float("inf")
    assert min(difference(lambda found: {**found, "boxes": found["boxes"].flip(1)})) > 1e-3
    assert min(difference(lambda found: {**found, "scores": found["scores"] + 0.01})) > 1e-3
    assert min(difference(lambda found: {**found, "pred_boxes": found["pred_boxes"].flip(1)})) > 1e-3
    assert min(difference(lambda found: {**found, "pred_logits": found["pred_logits"] * float("nan")})) == float("inf")
    assert greatest_difference(torch.ones(2), torch.ones(3)) == float("inf")
    assert not Case((1, 1), 1, float("nan")).passed


@pytest.mark.parametrize("names", [("NonZero", ""), ("Add", "com.microsoft")])
def test_a_graph_whose_shapes_depend_on_values_or_with_foreign_operators_is_refused(names):
    helper = pytest.importorskip("onnx.helper")
    operator, domain = names
    graph = helper.make_graph([helper.make_node(operator, ["a"], ["b"], domain=domain)], "g", [], [])
    with pytest.raises(RuntimeError, match=operator):
        exporting.check_graph(helper.make_model(graph))
    exporting.check_graph(helper.make_model(helper.make_graph([helper.make_node("Add", ["a"], ["b"])], "g", [], [])))


OPSETS = list(product(range(exporting.LEAST_OPSET + 1, exporting.GREATEST_OPSET + 1), ("--mask", "--no-mask")))


@pytest.mark.parametrize(("opset", "mask"), rest_in_soak(OPSETS, OPSETS[-1:]))
def test_every_opset_that_is_offered_works(tmp_path, checkpoint, opset, mask):
    pytest.importorskip("onnxruntime")
    (result,) = run_script("--resume", checkpoint[0], "--output_dir", tmp_path, "--format", "onnx",
                           "--opset", opset, mask)  # fmt: skip
    assert result.passed and result.opset == opset


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "--resume: found none"),
        ("--resume {path} --opset 17", "17: expected a whole number from 18 to 22"),
        ("--resume {path} --opset 23", "23: expected a whole number from 18 to 22"),
        ("--resume {path} --image_size_hw 100000 100000", "100000: expected a whole number from 1 to 4096"),
        ("--resume {path} --format tflite", "--format"),
        ("--resume {path} --lr 1", "unrecognized arguments: --lr 1"),
        ("--resume {path} --num_select 4", "--num_select: found no --detections"),
        ("--resume {path} --opset 20 --format pt2", "--opset: found --format pt2, expected onnx"),
        ("--resume {path} --dec_n_points 4", "--dec_n_points: dn_dab_detr has one level and no points"),
        ("--resume {path} --image_size_hw 32 128", "32 128: expected sides of at least 33 pixels"),
        ("--resume {path} --nheads 2", "--nheads 2"),
        ("--resume {path} --sampling gather", "--sampling: dn_dab_detr samples no feature maps"),
        (
            "--resume {path} --static --image_size_hw 64 64",
            "--static: found 2 sizes under --image_size_hw",
        ),
        ("--resume {path} --static 0", "0: expected a whole number from 1"),
    ],
)
def test_what_cannot_be_exported_is_an_error(tmp_path, checkpoint, words, told):
    with pytest.raises(UserError, match=told):
        run_script("--output_dir", tmp_path / "out", *words.format(path=checkpoint[0]).split())
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_an_error_before_anything_is_done(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"package onnx.*pip install '\.\[export\]'"):
        run_script("--resume", checkpoint[0], "--output_dir", tmp_path)


def test_the_smallest_side_has_two_feature_pixels():
    for network in VARIANTS.values():
        model = tiny_detector(network)[0].eval()
        least = exporting.least_side(model)
        for side, rows in ((least, 2), (least - 1, 1)):
            with torch.no_grad():
                assert model.features(torch.zeros(2, 3, side, side)).paddings[-1].shape[-2:] == (rows, rows)
