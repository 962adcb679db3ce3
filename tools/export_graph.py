"""Properties of an ONNX graph that other runtimes need: constants folded, no shape from values, ONNX's operators."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

# ONNX operators whose output shape or execution depends on values.
DATA_DEPENDENT = {"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "StringSplit", "Unique"}
# Inputs of ONNX operators that set the shape of their output, by position.
SHAPE_INPUTS = {
    "ConstantOfShape": (0,), "Expand": (1,), "OneHot": (1,), "Pad": (1,), "Range": (0, 1, 2), "Reshape": (1,),
    "Resize": (2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Tile": (1,), "TopK": (1,),
}  # fmt: skip
LARGEST_CONSTANT = 1 << 28  # elements


def fold_constants(model: Any) -> None:
    """Make whatever depends on constants alone a constant, such as parts of weights, in an `onnx_ir.Model`."""
    optimizer = importlib.import_module("onnxscript.optimizer")
    limits = {"input_size_limit": LARGEST_CONSTANT, "output_size_limit": LARGEST_CONSTANT}
    optimizer.fold_constants(model, **limits, should_fold=lambda node: True)
    optimizer.optimize(model, **limits)


def check_graph(model: Any, refused: frozenset[str] = frozenset()) -> None:
    """Check an ONNX model for runtimes that compile it.

    Args:
        model: an `onnx.ModelProto`.
        refused: further operators that it must not have.

    Raises:
        RuntimeError: it has operators that are not ONNX's, are refused, or depend on values; a shape that is computed
            from values; or an empty tensor.
    """
    foreign = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    found = sorted(foreign | (operators(model).keys() & (DATA_DEPENDENT | refused)))
    if found:
        raise RuntimeError(f"found the operators {', '.join(found)} in the exported graph")
    if shapes := shapes_from_values(model):
        raise RuntimeError(f"found shapes computed from values at {', '.join(shapes)} in the exported graph")
    if empty := empty_tensors(model):
        raise RuntimeError(f"found the empty tensors {', '.join(empty)} in the exported graph")


def operators(model: Any) -> Counter[str]:
    """Count the nodes of an ONNX model by operator."""
    return Counter(node.op_type for node in model.graph.node)


def shapes_from_values(model: Any) -> list[str]:
    """Return the nodes whose output shape is not computed from constants and the shapes of tensors alone."""
    known = {"", *(weight.name for weight in model.graph.initializer)}
    found = []
    for node in model.graph.node:
        inputs = [name in known for name in node.input]
        if node.op_type in ("Constant", "Shape", "Size") or (inputs and all(inputs)):
            known.update(node.output)
        positions = [place for place in SHAPE_INPUTS.get(node.op_type, ()) if place < len(inputs)]
        if not all(inputs[place] for place in positions):
            found.append(f"{node.op_type} {node.output[0]}")
    return found


def unfolded(model: Any) -> list[str]:
    """Return the nodes whose inputs are all constants."""
    constants = {"", *(weight.name for weight in model.graph.initializer)}
    return [
        f"{node.op_type} {node.output[0]}" for node in model.graph.node if all(name in constants for name in node.input)
    ]


def empty_tensors(model: Any) -> list[str]:
    """Return the names of the tensors of an ONNX model with an axis of length 0, weights or intermediate ones."""
    shapes = {weight.name: list(weight.dims) for weight in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.output):
        axes = value.type.tensor_type.shape.dim
        shapes[value.name] = [axis.dim_value if axis.HasField("dim_value") else None for axis in axes]
    return [name for name, shape in shapes.items() if 0 in shape]
