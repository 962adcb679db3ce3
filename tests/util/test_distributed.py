"""Work of the main process only, whose result or error reaches every process, and sums over all processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from util import distributed
from util.errors import UserError


def test_the_main_process_runs_it_once_and_all_get_its_result():
    calls = []
    assert distributed.on_main(lambda: calls.append(1) or "done") == "done"
    assert calls == [1]


def test_other_processes_receive_the_result_or_error(monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    sent = [("done", None)]
    monkeypatch.setattr(distributed, "from_main", lambda own: sent[0])
    assert distributed.on_main(lambda: pytest.fail("not the main process")) == "done"
    sent[0] = (None, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        distributed.on_main(lambda: pytest.fail("not the main process"))


def test_an_error_is_raised_unchanged():
    error = UserError("one sentence")

    def fail():
        raise error

    with pytest.raises(UserError) as raised:
        distributed.on_main(fail)
    assert raised.value is error


SCRIPT = """
import datetime, multiprocessing, sys, threading
import torch.distributed as dist
from util import distributed

class Odd(Exception):
    def __init__(self, number, text):  # pickled, and then cannot be read back
        super().__init__(text)

def with_lock():
    error = OSError(28, "disk full")
    error.lock = threading.Lock()
    return error

def fail(error):
    raise error

ACTIONS = {
    "pickled": lambda: fail(OSError(28, "disk full")),
    "not pickled": lambda: fail(with_lock()),
    "not read back": lambda: fail(Odd(1, "disk full")),
    "local class": lambda: fail(type("Local", (ValueError,), {})("disk full")),
    "a result that is not pickled": lambda: threading.Lock(),
}

def work(rank, store, name):
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=300))
    try:
        distributed.on_main(ACTIONS[name])
    except Exception as error:
        print(f"{rank} {type(error).__name__}: {error}\\n", end="", flush=True)
    assert distributed.gather_objects(rank) == [0, 1]  # both are still there, and in step
    distributed.stop()

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    for number, name in enumerate(ACTIONS):
        print(name, flush=True)
        workers = [context.Process(target=work, args=(rank, sys.argv[1] + str(number), name)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            sys.exit(1)
"""
MESSAGES = {
    "pickled": ("OSError: [Errno 28] disk full", "OSError: [Errno 28] disk full"),
    "not pickled": ("OSError: [Errno 28] disk full", "RuntimeError: OSError: [Errno 28] disk full"),
    "not read back": ("Odd: disk full", "RuntimeError: Odd: disk full"),
    "local class": ("Local: disk full", "RuntimeError: Local: disk full"),
    "a result that is not pickled": (
        "RuntimeError: TypeError: cannot pickle",
        "RuntimeError: TypeError: cannot pickle",
    ),
}


def run(script, folder):
    """The lines that a script prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "store")],
        cwd=Path(distributed.__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_an_error_that_cannot_be_pickled_reaches_every_process(tmp_path):
    printed = run(SCRIPT, tmp_path)
    assert printed[::3] == [*MESSAGES]
    for place, (name, messages) in enumerate(MESSAGES.items()):
        lines = sorted(printed[3 * place + 1 : 3 * place + 3])
        assert [line[:2] for line in lines] == ["0 ", "1 "], name
        for line, message in zip(lines, messages, strict=True):
            assert line[2:].startswith(message), name


def test_one_process_does_all_jobs_and_raises_an_error_unchanged():
    assert distributed.on_each({"a": lambda: 1, "b": lambda: 2}) == {"a": 1, "b": 2}
    assert distributed.on_each({}) == {}
    with pytest.raises(ZeroDivisionError):
        distributed.on_each({"a": lambda: 1, "b": lambda: 1 // 0})


# Appended to a script: `work` in three processes.
IN_THREE = """
if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, sys.argv[1])) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))
"""

JOBS = """
import datetime, multiprocessing, sys, threading
import torch
import torch.distributed as dist
from util import distributed

OWNERS = {"a": 2, "b": 0, "c": 2, "d": 1}  # of more jobs than processes
done = []

def fail(error):
    raise error

def work(rank, store):
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=3,
                            timeout=datetime.timedelta(seconds=300))

    def run(failing={}, owners=OWNERS, result=lambda name: torch.tensor([1 / 3, rank])):
        def job(name):
            done.append(name)
            return fail(failing[name]) if name in failing else result(name)

        done.clear()
        return distributed.on_each({name: (lambda name=name: job(name)) if owner == rank else None
                                    for name, owner in owners.items()})

    def error_of(*given, **options):
        try:
            return run(*given, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    found = run()
    assert [*found] == [*OWNERS] and [int(value[1]) for value in found.values()] == [*OWNERS.values()]
    assert all(torch.equal(value[:1], torch.tensor([1 / 3])) for value in found.values())
    assert done == [name for name in OWNERS if OWNERS[name] == rank]
    assert [*run(owners={"a": 1})] == ["a"] and run(owners={}) == {}  # fewer jobs than processes
    # The first in the order of the jobs, whoever failed first.
    assert error_of({"c": ValueError("of c"), "b": OSError(28, "disk full")}) == "OSError: [Errno 28] disk full"
    assert error_of({"c": ValueError("of c"), "d": KeyError("of d")}) == "ValueError: of c"
    assert done == [name for name in OWNERS if OWNERS[name] == rank]
    assert error_of({"a": ValueError("of a")}) == "ValueError: of a" and (rank != 2 or done == ["a"])
    own = ValueError("of d")
    own.lock = threading.Lock()  # cannot be pickled
    name = "ValueError" if rank == 1 else "RuntimeError: ValueError"
    assert error_of({"d": own}) == f"{name}: of d"
    unreadable = error_of(result=lambda name: threading.Lock() if name == "b" else 1)
    assert unreadable.startswith("RuntimeError: TypeError: cannot pickle"), unreadable
    assert distributed.gather_objects(rank) == [0, 1, 2]  # all are still there, and in step
    distributed.stop()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_each_job_is_done_by_its_process_and_the_first_error_reaches_all(tmp_path):
    run(JOBS + IN_THREE, tmp_path)


SUMS = """
import datetime, multiprocessing, sys
import torch
import torch.distributed as dist
from util import distributed

def work(rank, store):
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=3,
                            timeout=datetime.timedelta(seconds=300))
    assert distributed.sum_tensors([]) == []
    tall = torch.arange(6.0).view(3, 2).T * 10**rank
    own = [] if rank == 1 else [tall, torch.zeros(0, 4), torch.tensor(rank + 0.5, dtype=torch.float64)]
    sums = distributed.sum_tensors(own)
    assert [sum.dtype for sum in sums] == [torch.float32, torch.float32, torch.float64]
    assert torch.equal(sums[0], torch.arange(6.0).view(3, 2).T * 101) and float(sums[2]) == 3
    assert sums[1].shape == (0, 4) and (rank == 1 or sums[0] is own[0])
    distributed.stop()
"""


def test_tensors_are_added_also_over_processes_that_have_none(tmp_path):
    own = [torch.ones(2), torch.zeros(0, 0)]
    assert all(one is other for one, other in zip(distributed.sum_tensors(own), own, strict=True))
    if sys.platform == "linux":  # processes are forked
        run(SUMS + IN_THREE, tmp_path)


def test_a_gpu_does_without_attention_that_is_planned_for_each_shape(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        distributed.choose_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert distributed.choose_device("cuda") == torch.device("cuda", 0)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
