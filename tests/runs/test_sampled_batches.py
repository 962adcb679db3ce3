"""The pace of a sample leaves out what a run does only once, and counts optimizer steps as often as the run."""

import types
from collections import Counter

import pytest
import torch

from runs import sampled_batches
from runs.sampled_batches import MOST_PASSES, SampledBatches
from util import phases
from util.phases import TRAINING

CPU = torch.device("cpu")
BATCHES = [(["a", "b"], [{}, {}]), (["c", "d"], [{}, {}]), (["e"], [{}])]  # 5 images


@pytest.fixture
def now(monkeypatch):
    """A clock that shows `seconds`, which only the test changes."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(phases, "time", types.SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def paced(now, seconds_of_pass):
    """The sample, and how often each batch was given; `seconds_of_pass` of (first image, number of the pass)."""
    batches, passes = SampledBatches(BATCHES, TRAINING, CPU), Counter()
    for (first, *_), _ in batches:
        passes[first] += 1
        now.seconds += seconds_of_pass(first, passes[first])
    assert sum(passes.values()) <= len(batches)
    return batches.pace.computing, [*passes.values()]


def test_what_is_done_once_for_each_batch_is_not_counted(now):
    each = {"a": 0.1, "c": 0.2, "e": 0.3}  # sizes of images differ
    pace, passes = paced(now, lambda first, number: each[first] + (2.0 if number == 1 else 0.0))
    assert pace == pytest.approx(0.6 / 5) and passes == [3, 3, 3]


def test_a_steady_batch_is_given_twice_and_a_long_one_once(now):
    assert paced(now, lambda first, number: 0.5) == (pytest.approx(1.5 / 5), [2, 2, 2])
    assert paced(now, lambda first, number: 60.0) == (pytest.approx(180 / 5), [1, 1, 1])


def test_passes_that_never_agree_end(now):
    assert paced(now, lambda first, number: 0.1 * 0.5**number)[1] == [MOST_PASSES] * 3
    assert paced(now, lambda first, number: 2.0 / number)[1] == [6, 6, 6]
    assert paced(now, lambda first, number: 4.0 / number)[1] == [2, 2, 2]  # 6 s


@pytest.mark.parametrize("steps_each", [1 / 2, 1 / 3, 1 / 16])
def test_a_step_counts_as_often_as_the_run_takes_one(now, steps_each):
    each = {"a": 0.1, "c": 0.2, "e": 0.3}
    batches, passes = SampledBatches(BATCHES, TRAINING, CPU, steps_each), Counter()
    assert batches.accumulate == 2
    for (first, *_), _ in batches:
        passes[first] += 1
        now.seconds += each[first] + (0 if passes[first] % 2 else 1.0) + (4.0 if passes[first] == 1 else 0.0)
    assert batches.pace.computing == pytest.approx((0.6 + 3 * steps_each) / 5)
    assert [*passes.values()] == [6, 6, 6] and len(batches) == 2 * 3 * MOST_PASSES


def test_the_passes_of_a_batch_end_with_a_step(now):
    """Else the next batch would have its steps in the passes without one."""
    batches, passes = SampledBatches(BATCHES, TRAINING, CPU, 0.5), Counter()
    for (first, *_), _ in batches:
        passes[first] += 1
        now.seconds += 6.0 if first == "a" else 2.0 / sum(passes.values())
    assert passes["a"] == 2 and all(count % 2 == 0 for count in passes.values())


def test_processes_give_a_batch_equally_often(now, monkeypatch):
    """Another process takes 7 s for a pass, after which a pass is long."""
    monkeypatch.setattr(sampled_batches.distributed, "gather_objects", lambda seconds: [seconds, 7.0])
    assert paced(now, lambda first, number: 0.5) == (pytest.approx(21 / 5), [1, 1, 1])
