"""Several processes started by torchrun, or one: the same calls serve both."""

import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from util.errors import UserError

T = TypeVar("T")


def is_distributed() -> bool:
    """True in a process group, of one process too."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, by default CUDA where there is one; under torchrun the GPU of this local rank.

    Raises:
        UserError: `name` is no device of this machine.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device, expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if device.index is not None and processes > 1:
        raise UserError(f"--device {name}: found one GPU for {processes} processes, expected cuda, a GPU for each")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine or this build of torch has no CUDA, expected --device cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: GPU {index} was asked for, found {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def start(device: torch.device) -> None:
    """Join the process group that torchrun announces in the environment; nothing to do without one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not is_distributed():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the process group, if in one."""
    if is_distributed():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if is_distributed():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every process, by rank; picklable values of any size."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], T]) -> T:
    """What `action` gives in the main process, in every process; what it raises there is raised in every process.

    For whatever writes files: a full disk then ends all processes alike, and none waits for one that is gone. An
    exception that cannot be pickled is raised in the main process; the others raise a `RuntimeError` with its text.
    """
    result, problem = None, None
    if is_main():
        try:
            result = action()
        except Exception as error:
            problem = error
    own = problem
    result, problem = gather_objects(_picklable(result, problem) if world_size() > 1 else (result, problem))[0]
    if own is not None:
        raise own
    if problem is not None:
        raise problem
    return result


def _picklable(result: Any, problem: Exception | None) -> tuple[Any, Exception | None]:
    """Both as they are; where one of them cannot be pickled and read back, a `RuntimeError` says what it was."""
    try:
        pickle.loads(pickle.dumps((result, problem)))
    except Exception as error:
        told = error if problem is None else problem
        return None, RuntimeError(f"{type(told).__name__}: {told}")
    return result, problem


def average(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalar tensors averaged over the processes, without gradient; every process must hold the same names."""
    values = {name: value.detach() for name, value in values.items()}
    if not values or world_size() == 1:
        return values
    names = sorted(values)
    stacked = torch.stack([values[name].float() for name in names])
    dist.all_reduce(stacked)
    return dict(zip(names, stacked / world_size(), strict=True))


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Give every process the first one's buffers: each gathers BatchNorm statistics of its own images."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
