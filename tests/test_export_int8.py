"""INT8: which layers are quantised, which stay in float, and when a file is refused."""

import json

import pytest
import torch

from models.padding import PaddedImages, pad_images
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector
from tests.soak import rest_in_soak
from tests.test_export import SLIM, run_script, save
from tests.tiny_run import write_self_annotated
from tools import export_int8
from tools.export_formats import GraphForm, onnx_runner
from tools.export_int8 import GROUPS, Int8Result, grouped_nodes, inputs_of, quantise, try_forms
from tools.export_timing import onnx_of
from util.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

NETWORKS = {
    "one layer": ("--dec_layers 1", None),
    "dense": ("", None),
    "slim": ("", SLIM),
    "deformable": (f"{VARIANTS['deformable']} --dec_layers 1 --num_feature_levels 2", None),
}


@pytest.fixture(scope="module", params=rest_in_soak([*NETWORKS], ["one layer"]))
def exported(request):
    """A tiny detector and the bytes of its ONNX file."""
    network, widths = NETWORKS[request.param]
    model = tiny_detector(network, widths, seed=1)[0].eval()
    return model, onnx_of(model, (96, 128), GraphForm(with_mask=False))


def rounded(model):
    """Names of tensors that come from INT8."""
    return {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}


def quantised_layers(model):
    """Names of convolutions and matrix products with an input from INT8; both inputs must be."""
    from_int8 = rounded(model)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    found = {node.name: [name in from_int8 for name in node.input[:2]] for node in layers}
    assert all(any(of_node) == all(of_node) for of_node in found.values())
    return {name for name, of_node in found.items() if all(of_node)}


def test_each_layer_with_weights_has_the_group_of_its_place(exported):
    model, data = exported
    graph = onnx.load_model_from_string(data)
    groups = {group: [node for node, its in grouped_nodes(graph) if its == group] for group in GROUPS}
    assert sum(map(len, groups.values())) == len(grouped_nodes(graph)) and all(groups.values())
    assert {node.op_type for node in groups["convolutions"]} == {"Conv"}
    scopes = {
        group: [entry.value for node in nodes for entry in node.metadata_props if entry.key == export_int8.SCOPES]
        for group, nodes in groups.items()
    }
    for group, others in (("encoder", ".decoder."), ("decoder", ".encoder."), ("heads", ".layers.0.linear1")):
        assert not any(others in scope for scope in scopes[group])
    for group, inside in (("encoder", "encoder.layers.0.linear1"), ("decoder", "decoder.layers.0.linear2")):
        assert sum(inside in scope for scope in scopes[group]) == 1
    assert any("class_embed" in scope for scope in scopes["heads"])
    # What belongs to no module is the packed projections of self-attentions.
    packed = {group: sum("transformer" not in scope for scope in scopes[group]) for group in ("encoder", "decoder")}
    assert packed == ({"encoder": 0, "decoder": 2} if "deformable" in type(model).__module__ else
                      {"encoder": 2, "decoder": 0})  # fmt: skip


def test_the_layers_outside_the_groups_in_float_are_int8_and_outputs_stay_close(exported, tmp_path):
    _, data = exported
    batches = [inputs_of(torch.stack(pictures(((96, 128),), seed)[0]), with_mask=False) for seed in (1, 2)]
    expected, cache = onnx_runner(data, 1)(batches[0]), tmp_path / "ranges.json"
    layers = grouped_nodes(onnx.load_model_from_string(data))
    differences = []
    for in_float in ((), ("heads", "convolutions")):
        quantised = quantise(data, batches, in_float, cache)
        batches = iter(())  # the ranges are kept
        model = onnx.load_model_from_string(quantised)
        assert quantised_layers(model) == {node.name for node, group in layers if group not in in_float}
        if "convolutions" in in_float:  # residual sums and normalisation read exact tensors
            readers = {node.name for node in model.graph.node if rounded(model).intersection(node.input)}
            assert readers == quantised_layers(model)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert facts["precision"] == ("INT8, heads convolutions in float32" if in_float else "INT8")
        found = onnx_runner(quantised, 1)(inputs_of(torch.stack(pictures(((96, 128),), 1)[0]), with_mask=False))
        differences.append(
            max((found[key] - expected[key]).abs().max().item() for key in ("pred_logits", "pred_boxes"))
        )
    assert 0 < differences[1] < differences[0] < 1
    assert len(quantised) < len(data)


@pytest.mark.soak
def test_a_padding_mask_still_counts_in_int8(tmp_path):
    model = tiny_detector("--dec_layers 1", seed=1)[0].eval()
    data = onnx_of(model, (96, 128), GraphForm())
    batches = [inputs_of(torch.stack(pictures(((96, 128),), seed)[0]), with_mask=True) for seed in (1, 2)]
    quantised = onnx_runner(quantise(data, batches, (), tmp_path / "ranges.json"), 1)
    batch, padding, _ = pad_images([pictures(((60, 70),), 3)[0][0], torch.zeros(3, 96, 128)])
    images, mask = batch[:1], padding[:1]
    with torch.no_grad():
        expected = [model(PaddedImages(images, used))["pred_logits"] for used in (mask, mask & False)]
    found = [quantised({"images": images, "mask": used})["pred_logits"] for used in (mask, mask & False)]
    change = expected[0] - expected[1]
    assert (found[0] - found[1] - change).abs().max() < change.abs().max() / 2


def trial_files(monkeypatch, aps):
    """Replace quantisation by names of groups, whose AP is in `aps`."""
    monkeypatch.setattr(export_int8, "quantise", lambda data, batches, in_float, cache: " ".join(in_float).encode())
    return lambda data: aps[data.decode()]


def found_forms(monkeypatch, aps, float_ap, in_float=None, max_ap_loss=1.0):
    """The forms that were tried, and the result."""
    trials = try_forms(b"", [], float_ap, trial_files(monkeypatch, aps), in_float, max_ap_loss)
    return [" ".join(trial.in_float) for trial in trials], Int8Result(float_ap, trials, 128, 400, max_ap_loss, [])


def test_int8_leaves_the_groups_that_cost_most_in_float_until_ap_falls_by_little(monkeypatch):
    alone = {"": 0.50, "heads": 0.52, "decoder": 0.51, "encoder": 0.56, "convolutions": 0.50}
    forms, result = found_forms(monkeypatch, {**alone, "heads encoder": 0.595}, 0.6)
    assert forms == [*alone, "heads encoder"] and not result.is_good
    assert result.refusal == ("AP falls from 60.00 to 50.00 on 400 images, by more than --max_ap_loss 1; --int8_float "
                              "heads encoder has 59.50")  # fmt: skip
    forms, result = found_forms(monkeypatch, alone, 0.52)  # one group is enough
    assert forms == ["", "heads"] and result.refusal.endswith("; --int8_float heads has 52.00")
    forms, result = found_forms(monkeypatch, alone, 0.505)
    assert forms == [""] and result.is_good
    forms, result = found_forms(monkeypatch, {**alone, "heads encoder": 0.57, "heads decoder encoder": 0.58}, 0.6)
    assert forms[-1] == "heads decoder encoder" and len(forms) == 7
    assert result.refusal.endswith("by more than --max_ap_loss 1, and to 58.00 with heads decoder encoder in float32, "
                                   "the best form")  # fmt: skip


def test_groups_that_are_asked_for_are_tried_alone(monkeypatch):
    aps = {"heads": 0.585, "heads decoder": 0.595}
    forms, result = found_forms(monkeypatch, aps, 0.6, ["decoder", "heads"])
    assert forms == ["heads decoder"] and result.is_good
    forms, result = found_forms(monkeypatch, aps, 0.6, ["heads"])
    assert not result.is_good
    assert result.refusal == ("AP falls from 60.00 to 58.50 on 400 images, by more than --max_ap_loss 1; without "
                              "--int8_float, the layers to keep in float32 are searched for")  # fmt: skip


def test_the_loss_that_is_allowed_decides(monkeypatch):
    aps = {"": 0.593, "heads": 0.594, "decoder": 0.597, "encoder": 0.6, "convolutions": 0.6}
    assert found_forms(monkeypatch, aps, 0.6)[0] == [""]
    forms, result = found_forms(monkeypatch, aps, 0.6, max_ap_loss=0.5)
    assert forms == ["", "heads", "decoder"] and not result.is_good
    assert result.refusal == ("AP falls from 60.00 to 59.30 on 400 images, by more than --max_ap_loss 0.5; "
                              "--int8_float decoder has 59.70")  # fmt: skip
    assert result.figures["max_ap_loss"] == 0.5
    assert found_forms(monkeypatch, {"": 0.55}, 0.6, max_ap_loss=5.1)[1].is_good


def test_an_ap_that_is_no_number_does_not_hold(monkeypatch):
    _, result = found_forms(monkeypatch, {"": float("nan")}, 0.6, [])
    assert not result.is_good


def test_options_that_do_not_fit_int8_are_refused(tmp_path):
    save(tmp_path / "slim.pth", cfgs=SLIM)
    words = ["--resume", tmp_path / "slim.pth", "--output_dir", tmp_path / "out", "--format", "onnx"]
    with pytest.raises(UserError, match="--coco_path"):
        run_script(*words, "--int8", "--coco_path", tmp_path / "none")
    with pytest.raises(UserError, match="--int8_float, --max_ap_loss, --coco_path: found no --int8"):
        run_script(*words, "--int8_float", "heads", "--coco_path", tmp_path, "--max_ap_loss", "2")
    with pytest.raises(UserError, match="nan: expected a number in"):
        run_script(*words, "--int8", "--max_ap_loss", "nan")
    with pytest.raises(UserError, match="--int8: found --static"):
        run_script(*words, "--int8", "--static", "--coco_path", tmp_path)
    with pytest.raises(UserError, match="--int8_float: found all of heads, decoder, encoder, convolutions"):
        run_script(*words, "--int8", "--int8_float", *GROUPS, "--coco_path", tmp_path)
    assert not (tmp_path / "out").exists()


def test_outputs_of_a_runtime_are_in_the_order_of_the_images_whatever_their_sizes():
    seen = []

    def run(inputs):
        seen.append(tuple(inputs["images"].shape))
        mean = inputs["images"].mean((1, 2, 3))[:, None]
        assert inputs["mask"].shape == inputs["images"].shape[:1] + inputs["images"].shape[2:]
        return {"pred_logits": mean, "pred_boxes": -mean, "labels": mean}

    images = [torch.full((3, side, 8), float(number)) for number, side in enumerate((8, 4, 8, 4, 8))]
    found = export_int8.predictor(run, True)(images)
    assert seen == [(3, 3, 8, 8), (2, 3, 4, 8)]
    assert found["pred_logits"][:, 0].tolist() == [0, 1, 2, 3, 4] and set(found) == {"pred_logits", "pred_boxes"}


@pytest.mark.soak
def test_a_file_is_written_where_ap_holds_and_refused_where_it_falls_or_cannot_be_seen(tmp_path, monkeypatch):
    data = write_self_annotated(tmp_path / "data")
    out = tmp_path / "out"
    words = ["--resume", data / "dense.pth", "--output_dir", out, "--format", "onnx", "--int8", "--coco_path", data,
             "--num_workers", 0]  # fmt: skip
    run_script(*words, "--int8_float", "heads", "decoder", "--max_ap_loss", 100)
    figures = json.loads((out / "export.json").read_text())["int8"]
    assert figures["is_good"] and figures["images"] == 7 and figures["calibration_images"] == 2
    assert [trial["in_float"] for trial in figures["trials"]] == [["heads", "decoder"]]
    rows = {(row["runtime"], row["precision"]): row["ap"] for row in figures["rows"]}
    assert list(rows) == [("PyTorch", "float32"), ("PyTorch", "bfloat16"), ("onnxruntime", "float32"),
                          ("onnxruntime", "INT8, heads decoder in float32")]  # fmt: skip
    assert rows["PyTorch", "float32"] == pytest.approx(rows["onnxruntime", "float32"], abs=0.02)
    assert rows["onnxruntime", "float32"] == figures["float_ap"] > 0.3
    assert onnx.load(out / "dense.int8.onnx").graph.input[0].name == "images"

    monkeypatch.setattr(export_int8, "holds", lambda *given: False)
    with pytest.raises(SystemExit, match=r"dense.int8.onnx: AP falls from .* on 7 images.*; not written"):
        run_script(*words, "--int8_float", "heads")
    assert not (out / "dense.int8.onnx").exists() and (out / "dense.onnx").exists()
    assert not json.loads((out / "export.json").read_text())["int8"]["is_good"]

    tables = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    for entry in tables["annotations"]:
        entry["bbox"] = [0, 0, 1, 1]
    (data / "annotations" / "instances_val2017.json").write_text(json.dumps(tables))
    with pytest.raises(UserError, match=r"found AP .* in float32, expected at least 5 for --int8"):
        run_script(*words)
