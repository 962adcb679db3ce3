"""Distributed helpers that work with several processes, started by torchrun, or with one."""

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from util.errors import UserError

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether there is a process group, which may have one process."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Return whether this is the process that writes files and prints."""
    return rank() == 0


def choose_device(name: str | None) -> torch.device:
    """Return the device called `name`, by default CUDA if available; under torchrun the GPU of this local rank.

    On a GPU, this process does without cuDNN's attention from now on.

    Raises:
        UserError: this machine has no device `name`.
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
    # Since PyTorch 2.11, 16-bit attention on Hopper and Blackwell is cuDNN's unless that is off. cuDNN makes a plan for
    # each shape, in 0.44 s forward and 0.55 s backward on a B200 (modelscope/FunASR, issue 3704). Here shapes vary from
    # batch to batch with denoising queries and image sizes, and in a search with the heads' widths.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", index)


def start(device: torch.device) -> None:
    """Join the process group that torchrun sets in the environment, if there is one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not is_distributed():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the process group, if there is one."""
    if is_distributed():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes have called this function."""
    if is_distributed():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable `value` of every process, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_tensors(own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Add tensors over the processes; return the sums on the CPU of every process, none if no process has any.

    The processes that have any pass equally many, of the same shapes and dtypes. Those on the CPU are
    summed in place.
    """
    if world_size() == 1:
        return [tensor.cpu() for tensor in own]
    kinds = next((kinds for kinds in gather_objects([(t.shape, t.dtype) for t in own]) if kinds), [])
    sums = list(own) or [torch.zeros(shape, dtype=dtype) for shape, dtype in kinds]
    on_gpu = dist.get_backend() == "nccl"
    for place, tensor in enumerate(sums):
        sent = tensor.cuda() if on_gpu else tensor.cpu().contiguous()
        if sent.numel():
            dist.all_reduce(sent)
        sums[place] = tensor.copy_(sent) if tensor.device.type == "cpu" else sent.cpu()
    return sums


def from_main(value: Any) -> Any:
    """The main process's `value`, in every process; picklable values of any size."""
    if world_size() == 1:
        return value
    sent = [value]
    dist.broadcast_object_list(sent, 0)
    return sent[0]


def on_main(action: Callable[[], T]) -> T:
    """Run `action` in the main process; return its result, or raise its exception, in every process.

    Use it for writing files: a full disk then ends all processes, and none waits for another. If the exception cannot
    be pickled, the other processes raise a `RuntimeError` with its text.
    """
    result, problem = None, None
    if is_main():
        try:
            result = action()
        except Exception as error:
            problem = error
    own = problem
    result, problem = from_main(_picklable(result, problem) if world_size() > 1 else (result, problem))
    if own is not None:
        raise own
    if problem is not None:
        raise problem
    return result


def on_each(jobs: Mapping[str, Callable[[], T] | None]) -> dict[str, T]:
    """Run each job in one process; return the results of all in every process, by name.

    If jobs fail, every process raises the error of the first of them, as with `on_main`; none waits for another.

    Args:
        jobs: the same names in the same order in every process; each job is None in all processes but one.
    """
    done: dict[str, T] = {}
    problem, failed = None, None
    for name, job in jobs.items():
        if job is None:
            continue
        try:
            done[name] = job()
        except Exception as error:
            problem, failed = error, name
            break
    sent = _picklable(done, problem) if world_size() > 1 else (done, problem)
    names, found, problems = list(jobs), {}, {}
    for process, (name, results, other) in enumerate(gather_objects((failed, *sent))):
        if other is not None:
            own = problem if process == rank() else None  # not a copy
            problems[len(names) if name is None else names.index(name)] = own or other
        found |= results or {}
    if problems:
        raise problems[min(problems)]
    return {name: found[name] for name in names}


def _picklable(result: Any, problem: Exception | None) -> tuple[Any, Exception | None]:
    """Return both unchanged, or a `RuntimeError` with the text of the error if they cannot be pickled and read back."""
    try:
        pickle.loads(pickle.dumps((result, problem)))
    except Exception as error:
        shown = error if problem is None else problem
        return None, RuntimeError(f"{type(shown).__name__}: {shown}")
    return result, problem


def average(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Average scalar tensors over the processes, without gradient; all processes must pass the same names."""
    values = {name: value.detach() if value.requires_grad else value for name, value in values.items()}
    if not values or world_size() == 1:
        return values
    names = sorted(values)
    stacked = torch.stack([values[name].float() for name in names])
    dist.all_reduce(stacked)
    return dict(zip(names, stacked / world_size(), strict=True))


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Copy the first process's buffers to all others, since each collects BatchNorm statistics of its own images."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
