"""How many operators a training step starts: with a GPU they take the CPU 5 to 20 us each, however small they are.

On a CPU attention is several operators and norms of gradients are taken one by one, so the counts are not a GPU's.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from models.denoising_queries import DenoisingQueries, slot_indices
from models.matcher import HungarianMatcher
from tests.pruning.tiny import pictures, tiny_detector
from tests.test_waits import batches, teaching
from util.batch_record import BatchRecord
from util.ema import WeightAverage

CPU = torch.device("cpu")
SIZE = (64, 64)


class Operators(TorchDispatchMode):
    """Counts the operators that are started inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(action) -> int:
    with Operators() as operators:
        action()
    return sum(operators.found.values())


def losses_of(names: int) -> dict:
    return {f"loss {name}": torch.rand((), requires_grad=True) + 1 for name in range(names)} | {"loss": torch.ones(())}


def test_a_step_starts_no_more_operators_than_it_did():
    """The second of two steps with a teacher, mixed precision and averaged weights."""
    model, criterion, _ = tiny_detector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    operators, given = Operators(), batches(2)

    class Counted(list):
        def __iter__(self):
            yield self[0]
            with operators:
                yield self[1]

    engine.train_one_epoch(
        model, criterion, Counted(given), optimizer, device=CPU, clip_max_norm=0.1, amp="bf16", progress=False,
        weight_average=WeightAverage(model, 0.9), distillation=teaching(model, ""),
    )  # fmt: skip
    assert sum(operators.found.values()) <= 4750


@pytest.mark.parametrize("images", [2, 6])
def test_targets_and_matching_take_as_many_operators_for_any_number_of_images(images):
    _, targets = pictures((SIZE,) * images)
    logits, boxes = torch.rand(2, images, 5, 7), torch.rand(2, images, 5, 4)
    assert count(lambda: engine.targets_on(targets, CPU)) <= 6
    assert count(lambda: slot_indices(targets, DenoisingQueries(6, 2))) <= 5
    assert count(lambda: HungarianMatcher()(logits, boxes, targets)) <= 80


@pytest.mark.parametrize("names", [4, 60])
def test_records_and_sums_take_as_many_operators_for_any_number_of_losses(names):
    losses, means = losses_of(names), engine.Means()

    def record():
        batch = BatchRecord(losses, [], [], "")
        batch.start_copy(torch.ones(()))
        means.add(batch.losses)

    assert count(record) <= 12


def test_averaging_weights_takes_an_operator_for_floats_and_one_for_counts():
    average = WeightAverage(tiny_detector("--batch_norm_type BatchNorm2d")[0], 0.9)
    assert count(average.update) == 2
