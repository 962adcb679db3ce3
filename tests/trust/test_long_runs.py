"""Long runs do not grow: memory and open files after many steps are those after the first few.

`make test` takes as many steps as a minute's patience allows; 1,000 of each are marked `soak`.
"""

import gc
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch

import engine
from pruning.journal import Journal
from pruning.schedule import GP, Schedule
from reports import plots
from runs.search_command import get_pruning_parser, search
from tests.pruning.test_end_to_end import SMALL, write_folder
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector
from util.cli import parse
from util.ema import WeightAverage
from util.errors import RunFailedError

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="/proc tells how much memory a process has")

# Where a step keeps its graph, it adds some 3 MB; where it keeps a batch's outputs, 10 kB, and the tensors are counted.
# What the allocator holds back moves by a few MB either way.
BOUND_MB = 12.0
BOUND_TENSORS = 50  # those of a few batches
# Every decision is kept until the search ends, with its sets of channels: two of at most 400 numbers of 8 bytes.
BOUND_MB_A_DECISION = 0.0064
TENSORS_OF_A_DECISION = 2


class Growth:
    """Resident memory, open files and objects since a warm-up."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, int, int]:
        gc.collect()
        pages = int(STATM.read_text().split()[1])
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")), tensors

    def read(self) -> tuple[float, int, int]:
        """MB, files and tensors more than at the start."""
        return tuple(now - before for now, before in zip(self._now(), self.start, strict=True))


class Steps:
    """A loader of `count` batches that differ in size and number of boxes; `at` has what to call before a step."""

    def __init__(self, count: int, at: dict) -> None:
        sizes = ((64, 64), (64, 96))
        self.batches = [pictures(sizes[: 1 + seed % 2], seed) for seed in range(8)]
        for _, targets in self.batches:
            for target in targets:
                target["image_id"] = torch.tensor(0)
        self.count, self.at = count, at

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for number, batch in enumerate(itertools.islice(itertools.cycle(self.batches), self.count)):
            self.at.get(number, lambda: None)()
            yield batch


def train(variant: str, warm_up: int, steps: int) -> tuple[float, int, int]:
    """What `steps` training steps behind a warm-up add to the process."""
    model, criterion, _ = tiny_detector(f"{VARIANTS[variant]} --return_layer layer3")
    model.backbone.requires_grad_(False)  # it would be nine tenths of the time
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
    growth: list[Growth] = []
    loader = Steps(warm_up + steps, {warm_up: lambda: growth.append(Growth())})
    average = WeightAverage(model, 0.9)
    engine.train_one_epoch(model, criterion, loader, optimizer, device=torch.device("cpu"), amp="bf16", accumulate=2,
                           clip_max_norm=0.1, weight_average=average, progress=False)  # fmt: skip
    return growth[0].read()


def decide(folder: Path, out: Path, warm_up: int, steps: int, network: str) -> tuple[float, int, int]:
    """What `steps` decisions of a real search behind a warm-up add to the process; every module grows until whole."""
    words = f"{SMALL} {network} --coco_path {folder} --resume {folder}/dense.pth --output_dir {out} --search paper "
    words += "--map_tol 0 --decay_points 0 --attention_unit 1 --ffn_unit 1 --num_candidates_attention 4 "
    words += "--num_candidates_ffn 2 --subset_batches_attention 1 --subset_batches_ffn 1"
    args, typed = parse(get_pruning_parser(GP, "a test"), words.split())
    found: list[Growth | tuple] = []
    decisions, record = itertools.count(1), Journal.decision

    def watched(self, decision) -> None:
        record(self, decision)
        number = next(decisions)
        if number == warm_up:
            found.append(Growth())
        elif number == warm_up + steps:
            found.append(found[0].read())

    with (
        mock.patch.object(Journal, "decision", watched),
        mock.patch.object(Schedule, "full_threshold_ap", lambda *arguments: 1.1),
        mock.patch.multiple(plots, plot_widths=mock.DEFAULT, plot_ap_against_cost=mock.DEFAULT),
        pytest.raises(RunFailedError),  # every module is whole in the end
    ):
        search(GP, args, typed)
    assert len(found) == 2, f"the search ended with {next(decisions) - 1} decisions"
    return found[1]


def alone(run: Callable[..., tuple[float, int, int]], *args) -> tuple[float, int, int]:
    """`run` in a new process: in one that has run other tests, the allocator's memory moves by tens of MB."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(run, *args).result()


def check(growth: tuple[float, int, int], steps: int, decisions: int = 0) -> None:
    """Within the bounds for `steps`, of which that many are decisions that the search keeps."""
    megabytes, files, tensors = growth
    print(f"{steps} steps: {megabytes:+.2f} MB, {files:+d} files, {tensors:+d} tensors")
    assert megabytes < BOUND_MB + decisions * BOUND_MB_A_DECISION
    assert files <= 0
    assert tensors < BOUND_TENSORS + decisions * TENSORS_OF_A_DECISION


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_steps_do_not_add_up(variant):
    check(alone(train, variant, 40, 60), 60)


def test_decisions_of_a_search_do_not_add_up(tmp_path):
    folder = write_folder(tmp_path / "data", "")
    check(alone(decide, folder, tmp_path / "out", 40, 60, ""), 60, decisions=60)


@pytest.mark.soak
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_training_steps_do_not_add_up(variant):
    check(alone(train, variant, 200, 1000), 1000)


@pytest.mark.soak
def test_a_thousand_decisions_of_a_search_do_not_add_up(tmp_path):
    network = "--dim_feedforward 400"
    folder = write_folder(tmp_path / "data", network)
    check(alone(decide, folder, tmp_path / "out", 200, 1000, network), 1000, decisions=1000)
