"""A device without a machine: its tensors compute on the CPU, and what would make the CPU wait for a GPU is noted."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
# The autograd engine runs the backward of this device on the calling thread, as that of the CPU.
DEVICE = torch.device("meta")
CPU = torch.device("cpu")
ATEN = torch.ops.aten
# The size of their result depends on numbers, which a GPU's driver reads. `nonzero` and others carry a tag.
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default)
READS_SIZES = (ATEN.repeat_interleave.Tensor, ATEN.repeat_interleave.self_Tensor)


class Elsewhere(Tensor):
    """A tensor on `DEVICE`; its numbers are in `held`, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of OtherDevice")


def held(value: Any) -> Any:
    return tree_map_only(Elsewhere, lambda tensor: tensor.held, value)


class _ListsAsTensors(TorchFunctionMode):
    """PyTorch copies an index that is a list to the device of the tensor; for the name meta it leaves out the copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(_tensor(part).to(DEVICE) if isinstance(part, list) else part for part in index)
            args = (args[0], index, *args[2:])
        return func(*args, **(kwargs or {}))


class OtherDevice(TorchDispatchMode):
    """Computes on `DEVICE` inside the context.

    Attributes:
        waits: line of the program and operation of each wait of the CPU: a number read, a result whose size depends on
            numbers, and a copy between the devices that is not `non_blocking`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __enter__(self) -> OtherDevice:
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch("torch.tensor", _made))
        self.patches.enter_context(mock.patch("torch.is_autocast_enabled", lambda *_: False))
        self.patches.enter_context(mock.patch("torch.optim.adam._device_dtype_check_for_fused"))
        self.patches.enter_context(_ListsAsTensors())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert not tree_any(_is_lost, (args, kwargs)), f"{func} of a tensor without numbers"
        comes_from = _has_elsewhere((args, kwargs))
        goes_to = comes_from if kwargs.get("device") is None else torch.device(kwargs["device"]) == DEVICE
        if func in (ATEN._to_copy.default, ATEN.copy_.default):
            between = comes_from != goes_to if func is ATEN._to_copy.default else _mixed(args[:2])
            waits = between and not (kwargs.get("non_blocking") or args[2:] == (True,))
        else:
            waits = comes_from and (_reads_indices(args) if func in INDEXING else _reads_numbers(func))
            assert func in INDEXING or not _mixed_dims((args, kwargs)), f"{func} of tensors of two devices"
        if waits:
            self._note(func)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": CPU}
        result = func(*held(args), **held(kwargs))
        if func._schema.is_mutable:
            return _written(func, args, kwargs, result)
        return tree_map_only(Tensor, Elsewhere, result) if goes_to else result

    def _note(self, func: Any) -> None:
        frames = [
            f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and ".venv" not in f.filename
        ]
        place = [f for f in frames if not f.filename.startswith(str(ROOT / "tests"))] or frames
        self.waits.append(f"{Path(place[-1].filename).relative_to(ROOT)}:{place[-1].lineno} {func}")

    @staticmethod
    def move(module: nn.Module) -> nn.Module:
        """Put a module's parameters and buffers on the device, in place."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(Elsewhere(parameter.detach()), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = Elsewhere(buffer)
        return module


_tensor = torch.tensor


def _made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, which makes a tensor on the CPU and copies it; PyTorch leaves out both for the name meta."""
    made = _tensor(data, **options)
    return made if device is None else made.to(device)


def _is_lost(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == DEVICE and not isinstance(value, Elsewhere)


def _has_elsewhere(values: Any) -> bool:
    return tree_any(lambda value: isinstance(value, Elsewhere), values)


def _mixed(values: Any) -> bool:
    """Whether there are tensors of both devices."""
    on_cpu = tree_any(lambda value: isinstance(value, Tensor) and not isinstance(value, Elsewhere), values)
    return on_cpu and _has_elsewhere(values)


def _mixed_dims(values: Any) -> bool:
    """Whether tensors of both devices are mixed, other than single numbers of the CPU, which a GPU takes."""
    return _mixed(tree_map_only(Tensor, lambda t: t if t.dim() or isinstance(t, Elsewhere) else None, values))


def _reads_numbers(func: Any) -> bool:
    """Whether the result, or its size, depends on numbers that the CPU reads."""
    return func in READS_SIZES or bool(
        {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags)
    )


def _reads_indices(args: Any) -> bool:
    """Whether indices are masks, whose number of entries is read, or on the CPU, from where they are copied."""
    return any(
        index is not None and (index.dtype == torch.bool or not isinstance(index, Elsewhere)) for index in args[1]
    )


def _written(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """The arguments that an operation in place returns."""
    if result is None:
        return None
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return given[written[0]] if len(func._schema.returns) == 1 else tuple(given[name] for name in written)
