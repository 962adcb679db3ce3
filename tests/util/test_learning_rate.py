"""The learning rate depends only on the fraction of the run that is done."""

import itertools
import math
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from main import get_args_parser
from runs.config import TrainingConfig
from runs.training_state import TrainingState
from util.learning_rate import SCHEDULES, rate


def state_of(words: str, steps_per_epoch: int) -> TrainingState:
    """The training state of a model of one layer."""
    model = torch.nn.Linear(1, 1)
    model.backbone = [SimpleNamespace(trained_parameters=list)]
    return TrainingState(
        model, TrainingConfig.from_values(vars(get_args_parser().parse_args(words.split()))), steps_per_epoch
    )


def means_by_epoch(state: TrainingState) -> list[float]:
    """Mean learning-rate factor of each epoch."""
    steps = state.steps_per_epoch
    factors = [state.rate_factor(step) for step in range(state.training.epochs * steps)]
    return [mean(factors[first : first + steps]) for first in range(0, len(factors), steps)]


def test_rates_warm_up_then_decay():
    assert [rate(fraction, "step", drop=0.4) for fraction in (0, 0.39, 0.4, 0.79, 0.81, 1)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert [rate(f, "cosine") for f in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    for schedule in SCHEDULES:
        assert [rate(f, schedule, warmup=0.2) for f in (0, 0.05, 0.2)] == pytest.approx([0, 0.25, 1])
    assert rate(0.6, "cosine", warmup=0.2) == pytest.approx(0.5)
    # A warm-up as long as the run or longer ends with the run.
    assert rate(1, "cosine", warmup=1) == 1 and rate(1, "cosine", warmup=4) == 0.25


@given(st.sampled_from(SCHEDULES), st.integers(1, 400), st.integers(1, 40), st.integers(1, 60), st.integers(0, 9_000))
def test_factors_are_in_0_to_1_and_drop_at_the_first_step_of_an_epoch(schedule, steps, epochs, drop, warmup):
    words = f"--lr_schedule {schedule} --epochs {epochs} --lr_drop {drop} --warmup_iters {warmup}"
    state = state_of(words, steps)
    for step in {*range(0, epochs * steps, max(1, epochs * steps // 50)), epochs * steps - 1, epochs * steps}:
        assert 0 <= state.rate_factor(step) <= 1
    if schedule == "step" and warmup <= drop * steps and drop < epochs:
        first = drop * steps
        assert state.rate_factor(first) == pytest.approx(0.1)
        assert warmup == first or state.rate_factor(first - 1) > 0.9 * (first - 0.5) / first


@pytest.mark.parametrize("words", ["--lr_drop 2", "--lr_schedule cosine"])
@pytest.mark.parametrize("steps", [1, 3, 400])
def test_the_mean_rate_of_an_epoch_does_not_depend_on_its_number_of_steps(words, steps):
    """The half cosine has the error of the midpoint rule: 1 % of the full rate with one step per epoch."""
    words = f"{words} --epochs 5"
    assert means_by_epoch(state_of(words, steps)) == pytest.approx(means_by_epoch(state_of(words, 40)), abs=0.02)


def test_no_step_has_a_rate_of_0():
    state = state_of("--lr_schedule cosine --epochs 4 --warmup_iters 2", 3)
    factors = [state.rate_factor(step) for step in range(12)]
    assert min(factors) > 0 and factors[:2] == pytest.approx([0.25, 0.75])
    assert all(before > after for before, after in itertools.pairwise(factors[2:]))
    assert factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 9.5 / 10)))
