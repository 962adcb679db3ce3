"""Convert ONNX graphs to float16 where that is safe, as autocast does: weighted sums and what only moves their results.

Coordinates stay float32: 16 bits are too few for the pixels of a large map, for the angles of position encodings and
for logits of boxes near the image's border. So do softmax and normalisation.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

import numpy as np

HALF_TOLERANCE = 0.05  # greatest difference of a score or a box, both in [0, 1], from float32
HALF_SUMS = {"Conv", "Gemm", "MatMul"}
# In float16 too, unless a coordinate is computed from their result.
HALF_MOVES = {
    "Add", "Concat", "Expand", "Gather", "GatherElements", "GatherND", "MaxPool", "Mul", "PRelu", "Relu", "Reshape",
    "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
# In float32, with whatever computes their inputs from the weighted sums: functions of coordinates and of anchors.
OF_COORDINATES = {
    "Abs", "Cast", "Clip", "Cos", "CumSum", "Div", "Floor", "GreaterOrEqual", "GridSample", "Less", "Log", "Sigmoid",
    "Sin", "TopK",
}  # fmt: skip
NORMALISATIONS = {"InstanceNormalization", "LayerNormalization", "Softmax"}


def to_half(model: Any) -> Any:
    """Return a copy of an ONNX model with float16 weights and sums, and inputs and outputs as they were.

    Args:
        model: an `onnx.ModelProto` in float32, with folded constants.
    """
    onnx = importlib.import_module("onnx")
    model = onnx.shape_inference.infer_shapes(model)
    graph, float32, float16 = model.graph, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    kept = _nodes_in_float32(model)
    weights = {weight.name: weight for weight in graph.initializer}
    values = (*graph.value_info, *graph.input, *graph.output)
    floats = {value.name for value in values if value.type.tensor_type.elem_type == float32}
    floats |= {name for name, weight in weights.items() if weight.data_type == float32}
    nodes: list[Any] = []
    half: set[str] = set()  # tensors that are float16
    converted: set[str] = set()

    def in_type(name: str, to_half: bool) -> str:
        """Return the name of a tensor in the other type, which is computed or stored once."""
        other = f"{name}_{'half' if to_half else 'single'}"
        if other not in converted:
            converted.add(other)
            if name in weights:
                with np.errstate(over="ignore"):  # the least float32, of masks, becomes minus infinity
                    array = onnx.numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(onnx.numpy_helper.from_array(array, other))
            else:
                to = float16 if to_half else float32
                nodes.append(onnx.helper.make_node("Cast", [name], [other], name=f"cast_{other}", to=to))
        return other

    for place, node in enumerate(graph.node):
        is_half = place not in kept
        for number, name in enumerate(node.input):
            if name in floats and (name in half) != is_half:
                node.input[number] = in_type(name, is_half)
        nodes.append(node)
        if is_half:
            half.update(name for name in node.output if name in floats)
    _replace(graph.node, nodes)
    used = {name for node in nodes for name in node.input}
    _replace(graph.initializer, [weight for weight in graph.initializer if weight.name in used])
    del graph.value_info[:]  # has the former types
    return model


def rounded_twin(half_model: Any) -> Any:
    """Return a float32 model that rounds every result that `half_model` has in float16.

    onnxruntime's CPU computes runs of float16 operators in float32 without rounding between them, and so hides what
    other devices lose.
    """
    onnx = importlib.import_module("onnx")
    model = onnx.shape_inference.infer_shapes(half_model)
    graph, float32, float16 = model.graph, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    half = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == float16}
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == float16:
                attribute.i = float32
        nodes.append(node)
        for number, name in enumerate(node.output):
            if name in half:
                node.output[number], rounded = f"{name} exact", f"{name} rounded"
                nodes.append(onnx.helper.make_node("Cast", [node.output[number]], [rounded], to=float16))
                nodes.append(onnx.helper.make_node("Cast", [rounded], [name], to=float32))
    weights = [
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype(np.float32), weight.name)
        if weight.data_type == float16
        else weight
        for weight in graph.initializer
    ]
    _replace(graph.node, nodes)
    _replace(graph.initializer, weights)
    del graph.value_info[:]
    return model


def _nodes_in_float32(model: Any) -> Collection[int]:
    """Return the places of the nodes that stay in float32."""
    nodes = model.graph.node
    maker = {name: place for place, node in enumerate(nodes) for name in node.output}
    kept = {place for place, node in enumerate(nodes) if node.op_type not in HALF_SUMS | HALF_MOVES}
    todo = [place for place in kept if nodes[place].op_type in OF_COORDINATES]
    todo += [maker[output.name] for output in model.graph.output]
    kept.update(todo)
    while todo:
        for before in (maker.get(name) for name in nodes[todo.pop()].input):
            if before is not None and before not in kept and nodes[before].op_type in HALF_MOVES:
                kept.add(before)
                todo.append(before)
    return kept


def _replace(field: Any, content: list[Any]) -> None:
    content = [type(entry).FromString(entry.SerializeToString()) for entry in content]
    del field[:]
    field.extend(content)
