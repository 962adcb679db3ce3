"""Rates of a training go from its checkpoint through searches; odd values are not rates."""

import pytest

from runs.past_training import PastTraining

TRAINED = {"lr": 4e-4, "lr_backbone": 6e-4, "batch_size": 6, "accumulate": 2, "processes": 3}


def test_a_search_of_a_searchs_output_has_the_rates_of_the_training():
    past = PastTraining.of(TRAINED)
    assert past == PastTraining(4e-4, 6e-4, 36)
    of_search = {"batch_size": 16, "lr": 1e-5, **past.to_arguments()}
    assert PastTraining.of(of_search) == past
    assert PastTraining.of(PastTraining(1e-3, None, None).to_arguments()) == PastTraining(1e-3, None, None)


@pytest.mark.parametrize("lr", [None, 0, 0.0, -1e-4, True, "1e-4", float("nan"), float("inf"), 2, [1e-4]])
def test_a_rate_that_is_none_is_left_out(lr):
    assert PastTraining.of(TRAINED | {"lr": lr}) is None
    assert PastTraining.of({"past_lr": lr, "past_batch": 4}) is None
    assert PastTraining.of(TRAINED | {"lr_backbone": lr}) == PastTraining(4e-4, None, 36)


@pytest.mark.parametrize("name", ["batch_size", "accumulate", "processes"])
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, True, "2"])
def test_a_batch_is_only_known_with_all_its_factors(name, value):
    assert PastTraining.of(TRAINED | {name: value}) == PastTraining(4e-4, 6e-4, None)
    without = {key: found for key, found in TRAINED.items() if key != name}
    assert PastTraining.of(without) == PastTraining(4e-4, 6e-4, None)


def test_foreign_files_have_no_training():
    assert PastTraining.of({}) is None and PastTraining.of({"hidden_dim": 256}) is None
