"""Free memory as read from the files of several systems, and the peak memory of a computation."""

import math

import pytest
import torch

from util import memory
from util.memory import PeakMemory, available_ram, free_bytes, processes_here

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 10,000 kB free; `write` creates its other files."""

    def write(path, content):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(str(content))

    write("meminfo", "MemTotal:  20000 kB\nMemFree:   5000 kB\nMemAvailable:   10000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "groups")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return write


def test_without_limits_the_machines_free_memory_counts(machine):
    assert available_ram() == 10_000 * 1024
    machine("cgroup", "0::/user.slice\n")
    machine("groups/user.slice/memory.max", "max\n")
    machine("groups/user.slice/memory.current", 123)
    assert available_ram() == 10_000 * 1024


@pytest.mark.parametrize("path", ["/", "/docker/abc", "/outer/inner"])
def test_the_limit_of_a_container_counts(machine, path):
    machine("cgroup", f"0::{path}\n")
    machine("groups/memory.max", 5_000_000)
    machine("groups/memory.current", 3_000_000)
    machine("groups/memory.stat", "anon 1\nfile 1500000\ninactive_file 1000000\nactive_file 500000\n")
    assert available_ram() == 5_000_000 - 3_000_000 + 1_000_000


def test_the_tightest_of_nested_limits_counts(machine):
    machine("cgroup", "0::/outer/inner\n")
    machine("groups/outer/memory.max", 5_000_000)
    machine("groups/outer/memory.current", 4_500_000)
    machine("groups/outer/inner/memory.max", 4_000_000)
    machine("groups/outer/inner/memory.current", 1_000_000)
    assert available_ram() == 500_000
    machine("groups/outer/inner/memory.high", 1_200_000)
    assert available_ram() == 200_000
    machine("groups/outer/inner/memory.current", 1_300_000)
    assert available_ram() == 0


def test_control_groups_of_version_1_count(machine):
    machine("cgroup", "9:cpu,cpuacct:/job\n4:memory:/job/step\n0::/\n")
    machine("groups/memory/memory.limit_in_bytes", 9223372036854771712)
    machine("groups/memory/memory.usage_in_bytes", 70_000_000)
    machine("groups/memory/job/memory.limit_in_bytes", 6_000_000)
    machine("groups/memory/job/memory.usage_in_bytes", 2_000_000)
    machine("groups/memory/job/memory.stat", "inactive_file 7\ntotal_inactive_file 500000\n")
    assert available_ram() == 4_500_000


def test_other_systems_count_half_of_their_memory(machine, tmp_path, monkeypatch):
    (tmp_path / "meminfo").unlink()
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(memory.os, "sysconf", lambda name: sizes[name])
    assert available_ram() == 4096 * 500
    monkeypatch.delattr(memory.os, "sysconf")
    assert available_ram() == math.inf


def test_processes_on_one_machine_share_its_memory(machine, monkeypatch):
    assert processes_here() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert free_bytes(CPU) == 10_000 * 1024 / 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == 10_000 * 1024 / 4


def test_memory_reserved_by_torch_on_a_gpu_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cuda", 0)) == 120


def test_this_machine_has_memory():
    assert 0 < free_bytes(CPU) < math.inf


def test_the_peak_counts_tensors_that_are_alive_together():
    x, weight = torch.ones(100, 100, requires_grad=True), torch.ones(100, 100)
    one = x.nbytes
    with PeakMemory() as peak, torch.no_grad():
        y = x
        for _ in range(5):
            y = (y @ weight.T).exp()  # input, product and result at one time
    assert peak.peak_bytes == 3 * one
    with PeakMemory() as peak:
        y = x
        for _ in range(5):
            y = (y @ weight.T).exp()  # the five results are kept for the backward pass
    assert peak.peak_bytes == 6 * one
    with PeakMemory() as peak:
        torch.autograd.grad(y.sum(), x)
    assert 2 * one <= peak.peak_bytes <= 3 * one + 100
    with PeakMemory() as peak:
        x.view(-1)[:50].mul(1)
        weight.T.view_as(weight.T)
    assert peak.peak_bytes == 200
