"""Graphs that TensorRT and other runtimes can compile: plain operators, constants folded, no shape from values."""

import pytest
import torch

from models.widths import Widths
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector
from tests.soak import rest_in_soak
from tools import export_formats as exporting
from tools.export_graph import check_graph, empty_tensors, operators, shapes_from_values, unfolded
from tools.export_half import HALF_TOLERANCE, NORMALISATIONS, OF_COORDINATES, rounded_twin, to_half

helper = pytest.importorskip("onnx.helper")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SMALL = f"{VARIANTS['deformable']} --dec_layers 1 --num_feature_levels 2"
# Every kind of module with width 0, and slim ones whose widths occur nowhere else.
DENSE_WIDTHS = Widths.parse([[[0, 20]], [[8, 0, 16], [32, 12, 0]], [[5], [0], [9]]])
DEFORMABLE_WIDTHS = Widths.parse([[[12, 0]], [[0, 20, 28]]])
CASES = {
    "dense": ("--return_layer layer3", DENSE_WIDTHS, exporting.GraphForm(with_detections=True)),
    "deformable": (SMALL, DEFORMABLE_WIDTHS, exporting.GraphForm(by_gather=True)),
    "deformable of one size": (SMALL, None, exporting.GraphForm(by_gather=True, batch_size=2, with_mask=False)),
}  # fmt: skip
SLIM_SHAPES = {
    "dense": [(5, 64, 3, 3), (32, 9, 3, 3), (32, 20), (32, 12)],
    "deformable": [(32, 12), (32, 20), (32, 28)],
}


@pytest.fixture(scope="module", params=rest_in_soak([*CASES], ["dense", "deformable"]))
def exported(request):
    """A case's name, detector, form and ONNX model."""
    network, widths, form = CASES[request.param]
    model, _, postprocessors = tiny_detector(network, widths, seed=1)
    module = exporting.ExportModule(
        exporting.folded_copy(model), postprocessors["bbox"] if form.with_detections else None
    )
    program = exporting.trace(module.eval(), (96, 64), exporting.least_side(model), form)
    onnx = pytest.importorskip("onnx")
    return request.param, model.eval(), form, onnx.load_model_from_string(exporting.to_onnx(program, module, form, {}))


def test_a_graph_has_plain_operators_folded_constants_and_no_shape_from_values(exported):
    name, model, form, graph = exported
    counts = operators(graph)
    assert not counts.keys() & {"GridSample", "If", "Loop", "Scan", "NonZero", "BatchNormalization", "Identity"}
    assert counts["Conv"] == sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())  # norms are folded
    assert counts["Gather"] >= ("deformable" in name)
    assert shapes_from_values(graph) == empty_tensors(graph) == []
    # onnxscript folds no operator with several outputs: the norm of the first queries stays where they are constant.
    assert {node.split()[0] for node in unfolded(graph)} <= {"LayerNormalization"}
    assert (counts["Shape"] == 0) == (form.batch_size is not None)
    shapes = [tuple(weight.dims) for weight in graph.graph.initializer]
    for shape in SLIM_SHAPES.get(name, []):
        assert shape in shapes or shape[::-1] in shapes, shape


def test_a_graph_of_one_size_takes_that_size_and_gives_what_the_detector_gives(exported):
    _, model, form, graph = exported
    count = form.batch_size or 3
    images = torch.stack(pictures(((96, 64),) * count)[0])
    inputs = {"images": images, **({"mask": torch.zeros(count, 96, 64, dtype=torch.bool)} if form.with_mask else {})}
    run = exporting.onnx_runner(graph.SerializeToString())
    with torch.no_grad():
        expected = model(images)
    found = run(inputs)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)
    axes = [axis.dim_value for axis in graph.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ([2, 3, 96, 64] if form.batch_size else [0, 3, 0, 0])


def model_of(*nodes, constants=()):
    """An ONNX model of nodes (operator, inputs, output) with the input `x`, and constants by name."""
    tensors = [helper.make_tensor(name, 7, [len(values)], values) for name, values in constants]
    nodes = [helper.make_node(operator, inputs, [output]) for operator, inputs, output in nodes]
    value = helper.make_tensor_value_info("x", 1, ["a", 4])
    return helper.make_model(helper.make_graph(nodes, "g", [value], [], initializer=tensors))


def test_the_check_finds_shapes_from_values_empty_tensors_refused_operators_and_unfolded_constants():
    computed = model_of(("Shape", ["x"], "s"), ("Reshape", ["x", "s"], "y"))
    check_graph(computed)
    with pytest.raises(RuntimeError, match="operators Shape in"):
        check_graph(computed, frozenset({"Shape"}))
    of_values = model_of(
        ("Cast", ["x"], "s"), ("Mul", ["s", "c"], "t"), ("Expand", ["x", "t"], "y"), constants=[("c", [2])]
    )
    with pytest.raises(RuntimeError, match="shapes computed from values at Expand y"):
        check_graph(of_values)
    with pytest.raises(RuntimeError, match="the empty tensors c in"):
        check_graph(model_of(("Add", ["x", "c"], "y"), constants=[("c", [])]))
    assert unfolded(model_of(("Neg", ["c"], "d"), ("Add", ["x", "d"], "y"), constants=[("c", [1])])) == ["Neg d"]


def test_float16_is_for_weighted_sums_and_never_for_coordinates(exported):
    _, _, form, graph = exported
    before = graph.SerializeToString()
    half = to_half(graph)
    assert graph.SerializeToString() == before
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(half, full_check=True)
    check_graph(half, form.refused)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(half).graph.value_info}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)}
    types |= {weight.name: weight.data_type for weight in half.graph.initializer}
    float32, float16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    made_by = {name: node.op_type for node in half.graph.node for name in node.output}
    for node in half.graph.node:
        found = {types[name] for name in (*node.input, *node.output) if name} & {float32, float16}
        if node.op_type in ("Conv", "MatMul"):
            assert found == {float16}, node
        elif node.op_type == "Cast":  # nothing is rounded on its way from float32 to float32
            assert types[node.output[0]] != float32 or made_by.get(node.input[0]) != "Cast"
        elif node.op_type in OF_COORDINATES | NORMALISATIONS:
            assert found <= {float32}, node
    assert all(types[value.name] == float32 for value in half.graph.output if value.name != "labels")
    weights = {weight.data_type for weight in half.graph.initializer if len(weight.dims) > 1 and weight.dims[0] > 4}
    assert float16 in weights
    count = form.batch_size or 2
    inputs = {"images": torch.stack(pictures(((96, 64),) * count)[0])}
    inputs |= {"mask": torch.zeros(count, 96, 64, dtype=torch.bool)} if form.with_mask else {}
    twin = rounded_twin(half)
    expected, *found = (exporting.onnx_runner(m.SerializeToString())(inputs) for m in (graph, half, twin))
    for outputs in found:
        for key in ("pred_logits", "pred_boxes"):
            assert float((outputs[key] - expected[key]).abs().max()) < HALF_TOLERANCE
    assert not torch.equal(found[1]["pred_logits"], expected["pred_logits"])


def test_the_twin_rounds_between_float16_operators_which_onnxruntime_does_not():
    onnx = pytest.importorskip("onnx")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Add", ["r", "one"], ["a"])]
    nodes += [helper.make_node("Sub", ["a", "big"], ["s"]), helper.make_node("Sigmoid", ["s"], ["y"])]
    weights = [helper.make_tensor(name, 1, [1], [value]) for name, value in (("one", 1.0), ("big", 2048.0))]
    opset = [helper.make_opsetid("", 18)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializer=weights)
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.export_half._nodes_in_float32", lambda model: {3})
        half = to_half(model)
    given = {"x": torch.tensor([2048.0])}
    exact, rounded = (exporting.onnx_runner(m.SerializeToString())(given)["y"] for m in (half, rounded_twin(half)))
    assert float(exact) == pytest.approx(0.731, abs=1e-3) and float(rounded) == 0.5  # 2049 is no float16
