"""A clock of phases charges what a GPU does to the phase that started it, and does not make the CPU wait for it."""

import types

import pytest
import torch

from util import phases
from util.phases import PhaseClock, phase


class Machine:
    """A CPU and a GPU that works through a queue; times are in seconds."""

    def __init__(self):
        self.now = self.free_at = 100.0
        self.waits = 0

    def compute(self, seconds):
        self.now += seconds

    def queue(self, seconds):
        self.free_at = max(self.free_at, self.now) + seconds

    def wait(self, until):
        self.waits += self.now < until
        self.now = max(self.now, until)

    def make_event(self, enable_timing):
        assert enable_timing
        event = types.SimpleNamespace()
        event.record = lambda stream: setattr(event, "at", max(self.now, self.free_at))
        event.query = lambda: event.at <= self.now
        event.synchronize = lambda: self.wait(event.at)
        event.elapsed_time = lambda other: 1000 * (other.at - event.at)
        return event


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    gpu = types.SimpleNamespace(
        Event=found.make_event, current_stream=lambda device: None, synchronize=lambda device: found.wait(found.free_at)
    )
    monkeypatch.setattr(phases, "torch", types.SimpleNamespace(cuda=gpu, device=torch.device))
    monkeypatch.setattr(phases, "time", types.SimpleNamespace(perf_counter=lambda: found.now))
    return found


def run(machine, clock, batches):
    """Read each batch in 3 s beside the GPU, which computes on it for 5 s, of which the CPU sees 1 s."""
    with clock.running():
        for _ in range(batches):
            with phase("reading", 1):
                machine.compute(3)
            with phase("passes", 2):
                machine.queue(5)
                machine.compute(1)


def test_a_gpu_is_timed_without_waiting_for_it(machine):
    clock = PhaseClock(torch.device("cuda"))
    run(machine, clock, batches=200)
    assert machine.waits == 0 and machine.now == 100 + 200 * 4
    # The first batch is waited for; the GPU is still busy while the CPU reads the others.
    assert clock.seconds("reading") == 3 and clock.seconds("passes") == 200 * 5
    assert machine.waits == 1 and machine.now == machine.free_at == 100 + 3 + 200 * 5
    assert clock.count("passes") == 400 and clock.seconds_each("passes") == 2.5
    assert clock.to_dict()[1] == {"phase": "passes", "done": 400.0, "seconds": 1000.0}


def test_marks_of_a_gpu_are_let_go_when_it_has_passed_them(machine):
    clock = PhaseClock(torch.device("cuda"))
    run(machine, clock, batches=50)
    assert len(clock._intervals) < 45  # the GPU is 1 s behind for each batch
    machine.compute(1000)
    run(machine, clock, batches=1)
    assert len(clock._intervals) == 1


def test_a_clock_that_waits_lets_nothing_overlap(machine):
    clock = PhaseClock(torch.device("cuda"), waits=True)
    run(machine, clock, batches=4)
    assert clock.seconds("reading") == 4 * 3 and clock.seconds("passes") == 4 * 5
    assert machine.waits == 4


def test_an_inner_phase_counts_only_for_itself(machine):
    for device in ("cpu", "cuda"):
        clock = PhaseClock(torch.device(device))
        with clock.running(), phase("outer"):
            machine.compute(1)
            with phase("inner"):
                machine.compute(2)
            machine.compute(4)
        machine.compute(8)
        assert clock.seconds("outer") == 5 and clock.seconds("inner") == 2 and clock.seconds("none") == 0
