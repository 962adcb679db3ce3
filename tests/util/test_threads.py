"""Threads of the main process's fits: those of idle cores, and afterwards as many as before."""

import datetime
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from util import distributed, memory, threads
from util.threads import idle_cores, usable_cores


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("everywhere", "backend", "cores", "processes", "expected"),
    [
        (False, "gloo", 8, 1, 1),
        (False, "nccl", 8, 1, 1),
        (False, "gloo", 8, 4, 8),
        (False, "nccl", 8, 4, 5),
        (False, "gloo", 2, 8, 2),
        (False, "nccl", 4, 4, 1),
        (False, "nccl", 2, 8, 1),
        (False, "nccl", 64, 8, threads.MOST_THREADS),
        (True, "gloo", 8, 1, 1),
        (True, "gloo", 9, 4, 2),
        (True, "nccl", 8, 4, 2),
        (True, "gloo", 2, 4, 1),
        (True, "nccl", 256, 8, threads.MOST_THREADS),
    ],
)
def test_a_fit_has_its_share_of_the_cores_that_no_waiting_process_keeps_busy(
    monkeypatch, everywhere, backend, cores, processes, expected
):
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(threads.dist, "get_backend", lambda: backend)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with idle_cores(everywhere=everywhere):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="inside"), idle_cores(everywhere=everywhere):
        raise ValueError("inside")
    assert torch.get_num_threads() == 1


def test_a_number_of_threads_that_was_chosen_stays(monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with idle_cores():
        assert torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    torch.set_num_threads(9)
    with idle_cores():
        assert torch.get_num_threads() == 9
    torch.set_num_threads(1)
    monkeypatch.setenv("MKL_NUM_THREADS", "1")  # which torchrun does not set
    for everywhere in (False, True):
        with idle_cores(everywhere=everywhere):
            assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({"": "max 100000"}, 12), ({"": "250000 100000"}, 2), ({"": "50000 100000"}, 1), ({"a": "400000 100000"}, 4),
     ({"a": "900000 100000", "a/b": "300000 100000"}, 3), ({"a/b": "nonsense"}, 12), ({"a/b": "1 0"}, 12)],
)  # fmt: skip
def test_the_cpu_limit_of_a_container_counts(tmp_path, monkeypatch, limits, expected):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert usable_cores() == 12  # no control groups
    (tmp_path / "cgroup").write_text("4:memory:/elsewhere\n0::/a/b\n")
    for group, text in limits.items():
        folder = tmp_path / "groups" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{text}\n")
    assert usable_cores() == expected


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [({"": "-1"}, 12), ({"": "-1", "a": "250000"}, 2), ({"a": "300000", "a/b": "150000"}, 1), ({"": "400000"}, 4),
     ({"a": "nonsense"}, 12), ({"a": "0"}, 12)],
)  # fmt: skip
def test_the_cpu_limit_of_control_groups_of_version_1_counts(tmp_path, monkeypatch, quotas, expected):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    (tmp_path / "cgroup").write_text("9:memory:/a/c\n5:cpuset:/a/c\n4:cpu,cpuacct:/a/b\n0::/\n")
    for group, quota in {"c": "100000", **quotas}.items():  # c is not a group of this process
        folder = tmp_path / "groups" / "cpu" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == expected


def fit_in_two_processes(rank, store):
    """A fit succeeds and one fails: both processes get the first's result and error, and keep their threads."""
    import torch.distributed as dist

    from pruning.finite_checks import decided_on_main
    from util import distributed
    from util.errors import NonFiniteLossError

    torch.set_num_threads(1)
    threads.usable_cores = lambda: 4
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=300))  # fmt: skip

    def fit():
        return torch.tensor([float(distributed.rank()), float(torch.get_num_threads())])

    assert decided_on_main("the fit", fit, lambda found: [found]).tolist() == [0, 4]
    assert torch.get_num_threads() == 1

    def fail():
        assert rank == 0
        torch.linalg.cholesky(-torch.eye(2))

    try:
        decided_on_main("the fit", fail, lambda found: [])
    except NonFiniteLossError as error:
        assert distributed.gather_objects(str(error)) == 2 * [str(error)] and "the fit failed" in str(error)
    else:
        raise AssertionError("the other process went on")
    assert torch.get_num_threads() == 1
    distributed.stop()


def main(store):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fit_in_two_processes, args=(rank, store)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_the_main_process_fits_with_idle_cores_and_its_error_reaches_all(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.util import test_threads; test_threads.main({str(tmp_path / 'store')!r})"],
        cwd=Path(threads.__file__).parent.parent,
        env={name: value for name, value in os.environ.items() if name != "MKL_NUM_THREADS"}
        | {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
