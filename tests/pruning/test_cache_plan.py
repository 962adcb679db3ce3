"""How much memory a search takes, against what it is seen to take, and what it does where there is less."""

import argparse
import dataclasses
import json
from itertools import product

import pytest
import torch

from datasets.coco import build_dataset
from models.state import Features
from pruning import cache_plan
from pruning.cache_plan import CacheOptions, CachePlanner, Uses, shape_of
from pruning.cache_setup import cache_options, sizes_of, split_by_size
from pruning.config import SearchConfig
from pruning.schedule import GP, MGP
from pruning.state_cache import PassCounter, StateCache
from runs.search_command import get_pruning_parser, search
from tests.pruning.test_end_to_end import SMALL, write_folder
from tests.pruning.tiny import VARIANTS, ListedBatches, pictures, tiny_args, tiny_detector
from tests.soak import rest_in_soak
from util import distributed
from util.cli import parse
from util.errors import UserError
from util.memory import USABLE_SHARE

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = [((64, 64), (64, 128)), ((128, 128), (128, 128), (128, 128)), ((64, 192),), ((192, 128), (64, 64))]
BATCHES = ListedBatches([pictures(sizes, seed=seed) for seed, sizes in enumerate(SIZES)])
SHAPES = [shape_of(sizes) for sizes in SIZES]
UNITS = "--attention_unit 2 --ffn_unit 8 --map_tol 0.9"
SEARCHES = {
    "fast": f"--search fast {UNITS} --calibration_images 4 --search_split val2017",
    "visit": f"--search visit {UNITS} --calibration_images 4",
    "paper": f"--search paper {UNITS} --num_candidates_attention 4 --num_candidates_ffn 4",
}


def run(schedule, folder, out, more):
    words = f"{SMALL} --coco_path {folder} --resume {folder}/dense.pth --output_dir {out} {more}".split()
    return search(schedule, *parse(get_pruning_parser(schedule, "a test"), words))


def planner_of(model, device=CPU, options=None, **uses):
    uses = {
        "kept_batches": range(4), "calibrated_batches": [], "images_at_once": 1, "reading": 0.0, "evaluation": 0.0,
        "images": 8, "calibrated_images": 8, **uses,
    }  # fmt: skip
    return CachePlanner(model, Uses(SHAPES, **uses), options or CacheOptions(), device)


def cache_of(model, planner):
    shares = dict.fromkeys(model.step_names, 1.0)
    return StateCache(model, BATCHES, PassCounter(shares), device=CPU, plan=planner)


@pytest.mark.parametrize("dtype", ["same", "bfloat16"])
@pytest.mark.parametrize("kept", [range(4), [0], [3, 1]])
@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_the_estimate_is_what_the_cache_holds_at_its_largest(network, kept, dtype):
    model = tiny_detector(network)[0].eval()
    planner = planner_of(model, options=CacheOptions(dtype=dtype), kept_batches=kept)
    cache = cache_of(model, planner)
    features_bytes, largest = cache.nbytes, 0
    for name in model.step_names:
        cache.move_to(name)
        for _ in cache.states(list(kept)):
            largest = max(largest, cache.nbytes)
        for _ in cache.states(is_kept=False):
            assert cache.nbytes <= largest
    with torch.no_grad():
        need, _ = planner.measure(model.features(BATCHES[0][0]), 0)
    assert need.total(cache.storage.dtype) - need.states == pytest.approx(features_bytes, rel=0.02)
    assert need.total(cache.storage.dtype) == pytest.approx(largest, rel=0.02)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    words = VARIANTS[request.param]
    return write_folder(tmp_path_factory.mktemp("variant"), words), words


ESTIMATED = list(product(SEARCHES, ("", "--cache_dtype bfloat16")))


@pytest.mark.parametrize(("kind", "more"), rest_in_soak(ESTIMATED, [ESTIMATED[0], ESTIMATED[3]]))
def test_the_estimate_is_what_a_search_holds_at_its_largest(variant, tmp_path, monkeypatch, kind, more):
    folder, network = variant
    found, held = [], []
    measure, keep_state = CachePlanner.measure, StateCache._keep_state

    def measured(planner, features, front_bytes):
        found.append(measure(planner, features, front_bytes))
        return found[-1]

    def kept(cache, *arguments):
        keep_state(cache, *arguments)
        held.append(cache.nbytes)

    monkeypatch.setattr(CachePlanner, "measure", measured)
    monkeypatch.setattr(StateCache, "_keep_state", kept)
    run(GP, folder, tmp_path, f"{network} {SEARCHES[kind]} {more}")
    (need, _) = found[0]
    assert need.total(torch.bfloat16 if more else None) == pytest.approx(max(held), rel=0.05)


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_passes_take_what_the_largest_batch_takes(network):
    model = tiny_detector(network)[0].eval()
    with torch.no_grad():
        features = model.features(BATCHES[0][0])

    def passes(front_bytes=0, **uses):
        return planner_of(model, **uses).measure(features, front_bytes)[1].passes

    forward = passes()
    assert passes(images_at_once=30) == pytest.approx(15 * forward)  # the largest have 2 or 3 images
    # Three images of 128 x 128 against two of 64 x 128.
    assert passes(front_bytes=1e9) == pytest.approx(3e9)
    backward = passes(calibrated_batches=[0])
    assert backward > passes(images_at_once=1)
    more = passes(calibrated_batches=[0, 1]) - backward
    assert more == pytest.approx(cache_plan.CALIBRATION_SHARE * 6 * features.memory[0].nbytes)


@pytest.fixture
def machine(monkeypatch):
    """Sets how many bytes are free in RAM and on the GPU."""

    def has(ram, gpu=0.0):
        monkeypatch.setattr(cache_plan, "free_bytes", lambda device: ram if device.type == "cpu" else gpu)

    return has


class Settled:
    """A planner's parts: the features of the first batch, what is needed, and its decisions."""

    def __init__(self, device, options=None, **uses):
        self.model = tiny_detector()[0].eval()
        self.planner = planner_of(self.model, device, options, **uses)
        with torch.no_grad():
            self.features = self.model.features(BATCHES[0][0])
        self.need, self.work = self.planner.measure(self.features, 0)

    def beside(self, device):
        return self.planner._beside(device, self.work)

    def free(self, device, share_of_need, dtype=None):
        """Free bytes that leave this share of what is needed."""
        return (share_of_need * self.need.total(dtype) + self.beside(device)) / USABLE_SHARE + 1

    def decide(self):
        storage = self.planner(self.features, 0)
        return storage.device, storage.dtype


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("shares", "decision"),
    [
        ({GPU: (1, None), CPU: (9, None)}, (GPU, None)),
        ({GPU: (0.99, None), CPU: (1, None)}, (CPU, None)),
        ({GPU: (1, HALF), CPU: (0.99, None)}, (GPU, HALF)),
        ({GPU: (0.99, HALF), CPU: (1, HALF)}, (CPU, HALF)),
        ({GPU: (0.5, HALF), CPU: (0.9, HALF)}, (CPU, HALF)),
        ({GPU: (0.9, HALF), CPU: (0.5, HALF)}, (GPU, HALF)),
        ({GPU: (0, HALF), CPU: (0, HALF)}, None),
    ],
)
def test_a_gpu_comes_before_ram_and_precision_before_speed(machine, shares, decision):
    settled = Settled(GPU, reading=1e6, evaluation=2e6)
    machine(*(settled.free(device, *shares[device]) for device in (CPU, GPU)))
    if decision is not None:
        assert settled.decide() == decision
    else:
        machine(settled.beside(CPU) / USABLE_SHARE, 0.0)
        assert settled.decide() == (GPU, None)


def test_a_cache_in_ram_leaves_the_gpu_alone(machine):
    settled = Settled(GPU, CacheOptions(device=CPU))
    machine(settled.free(CPU, 1), 1e12)
    assert settled.decide() == (CPU, None)


@pytest.mark.parametrize(("dtype", "decision"), [("same", None), ("bfloat16", HALF), (None, HALF)])
def test_a_precision_that_was_asked_for_is_kept(machine, capsys, dtype, decision):
    settled = Settled(CPU, CacheOptions(dtype=dtype))
    machine(settled.free(CPU, 0.8, HALF))
    assert settled.decide() == (CPU, decision)
    machine(1e12)
    assert settled.decide() == (CPU, HALF if dtype == "bfloat16" else None)


def test_what_is_free_or_asked_for_is_the_limit(machine):
    settled = Settled(CPU, evaluation=3e6)
    machine(1e9)
    assert settled.planner(settled.features, 0).max_bytes == USABLE_SHARE * 1e9 - settled.beside(CPU)
    assert settled.beside(CPU) == settled.work.passes + 3e6
    asked = Settled(CPU, CacheOptions(gigabytes=1.5))
    assert asked.planner(asked.features, 0).max_bytes == 1.5e9
    on_gpu = Settled(GPU, CacheOptions(gigabytes=1.5))
    machine(1e12, 1e9)
    storage = on_gpu.planner(on_gpu.features, 0)
    assert storage.max_bytes == USABLE_SHARE * 1e9 - on_gpu.work.passes
    assert storage.state_bytes == on_gpu.need.states


def test_nothing_is_rounded_where_nothing_is_kept(machine):
    settled = Settled(CPU, CacheOptions(gigabytes=0.0))
    machine(1e12)
    storage = settled.planner(settled.features, 0)
    assert (storage.dtype, storage.max_bytes) == (None, 0)


def test_the_largest_limit_holds_in_16_bits(machine):
    settled = Settled(CPU)
    half = Features(settled.features.memory.half(), settled.features.paddings, settled.features.is_padded)
    machine(settled.beside(CPU) / USABLE_SHARE + 1000)
    settled.planner._uses = argparse.Namespace(**{**vars(settled.planner._uses), "eval_amp": "bf16"})
    assert settled.planner._dtypes(half) == [None]


def test_a_warning_names_the_options_and_the_gigabytes(machine, capsys, monkeypatch):
    monkeypatch.setattr(cache_plan, "GB", 1e6)  # a tiny detector's
    settled = Settled(CPU, CacheOptions(searched="--search_images 8"))
    whole, halved = (settled.need.total(dtype) / 1e6 for dtype in (None, HALF))
    machine(settled.free(CPU, 1))
    settled.decide()
    assert capsys.readouterr().out == ""

    machine(free := settled.free(CPU, 1, HALF))
    settled.decide()
    message = " ".join(capsys.readouterr().out.split())
    assert f"--search_images 8: features and states need {whole:.1f} GB" in message
    assert f"{halved:.1f} of {free / 1e6:.1f} GB of free RAM may be used (--cache_gb)" in message
    assert f"in bfloat16 ({halved:.1f} GB)" in message

    for share, kept in (
        (0.5, "all features, not all states, are kept in bfloat16"),
        (0.1, " % of the images are kept"),
    ):
        machine(settled.free(CPU, share, HALF))
        settled.decide()
        message = " ".join(capsys.readouterr().out.split())
        assert f"--search_images 8: features and states need {whole:.1f} GB" in message
        assert kept in message and f"in bfloat16 ({halved:.1f} GB)" in message
        assert "fewer --search_images or a larger --cache_gb" in message
    percent = 100 * (0.1 * settled.need.total(HALF) / 2) / settled.need.halved
    assert f"features of about {percent:.0f} % of the images" in message


def test_a_search_that_cannot_run_is_refused_with_the_figures(machine, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    settled = Settled(CPU, CacheOptions(searched="--search_images all"), evaluation=16e9, reading=1e9, images=118_287)
    machine(14e9)
    message = (
        r"--search_images all: found 14\.0 GB of free RAM, expected at least 21\.\d GB: 16\.0 GB for mAP of 118,287 "
        r"images, 0\.0 GB for passes through the network, 1\.0 GB for images read ahead, .* fewer --search_images"
    )
    with pytest.raises(UserError, match=message):
        settled.decide()
    machine(settled.beside(CPU) / USABLE_SHARE + 1)
    settled.decide()  # runs, however little is kept
    machine(14e9)
    asked = Settled(CPU, CacheOptions(gigabytes=0.0), evaluation=16e9)
    asked.decide()


def test_a_gpu_that_is_full_is_no_reason_to_refuse(machine):
    settled = Settled(GPU)
    machine(1e12, 0.0)
    assert settled.decide() == (CPU, None)


def test_all_processes_keep_one_precision_and_end_together(machine, monkeypatch):
    settled = Settled(CPU)
    machine(1e12)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, (1, None)])
    assert settled.decide() == (CPU, HALF)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, (2, None)])
    assert settled.decide() == (CPU, HALF)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, (0, "too little on the other one")])
    with pytest.raises(UserError, match="too little on the other one"):
        settled.decide()


def test_a_gpu_that_cannot_hold_one_image_ends_all_processes_with_a_one_line_error(machine, monkeypatch):
    settled, sent = Settled(GPU), []

    def measure(features, front_bytes):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(settled.planner, "measure", measure)
    monkeypatch.setattr(distributed, "gather_objects", sent.append)
    with pytest.raises(UserError, match=r"^cuda.*: found too little memory for one image of the search, expected"):
        settled.decide()
    ((choice, problem),) = sent
    assert choice == 0 and problem.startswith("cuda")


@pytest.fixture
def sized(variant):
    """A data set, the shapes of its batches as read, and a function that returns those that are planned."""
    folder, network = variant
    args = tiny_args(f"{SMALL} {network} --coco_path {folder}")
    batches = [range(2), range(2, 4), range(4, 7)]
    dataset = build_dataset("val2017", args)
    read = [shape_of([tuple(dataset[index][0].shape[-2:]) for index in batch]) for batch in batches]
    assert {shape.is_padded for shape in read} == {True}

    def planned(reads_files):
        size_hw = sizes_of(dataset, args.image_size, reads_files=reads_files)
        return [shape_of([size_hw(index) for index in batch]) for batch in batches]

    return dataset, read, planned


def test_shapes_are_those_of_the_batches_without_decoding_images(sized, monkeypatch):
    dataset, read, planned = sized
    listed = dataset.annotations.sizes_wh
    monkeypatch.setattr("datasets.decode._decode", None)
    for factor, kinds in ((1, (False, True)), (0, (False, True)), (2, (True,))):  # right, missing and wrong sizes
        dataset.annotations = dataclasses.replace(dataset.annotations, sizes_wh=factor * listed)
        assert all(planned(reads_files) == read for reads_files in kinds)
    dataset.folder, dataset.annotations = None, dataclasses.replace(dataset.annotations, sizes_wh=listed)
    assert planned(False) == read  # reads no file


def test_a_file_without_a_size_is_named(sized, tmp_path):
    dataset, _, planned = sized
    dataset.folder = tmp_path
    with pytest.raises(UserError, match=r"000000\.png cannot be read as an image"):
        planned(True)


def test_batches_are_split_into_images_of_one_size():
    sizes = [(64, 64), (64, 80), (64, 64), (80, 64), (80, 64)]
    split = split_by_size([[0, 1, 2], [3, 4], [1]], [0, 2, 4], sizes.__getitem__)
    assert split == ([[0, 2], [1], [3, 4], [1]], [0, 0, 2, 4])


@pytest.mark.parametrize("variant", rest_in_soak([*VARIANTS], ["dense"]), indirect=True)
def test_searches_give_the_same_with_any_memory_and_are_refused_without(variant, tmp_path, monkeypatch):
    folder, network = variant
    words = f"{network} --search visit --ranking random --reconstruct none {UNITS}"
    whole = run(MGP, folder, tmp_path / "whole", words)
    work = []
    measure = CachePlanner.measure

    def measured(planner, *given):
        need, beside = measure(planner, *given)
        work.append(planner._beside(CPU, beside))
        return need, beside

    monkeypatch.setattr(CachePlanner, "measure", measured)
    monkeypatch.setattr(cache_plan, "free_bytes", lambda device: work[-1] / USABLE_SHARE + 1e4)
    few = run(MGP, folder, tmp_path / "few", f"{words} --cache_dtype same")
    assert few.widths == whole.widths and few.ap == whole.ap and few.base_ap == whole.base_ap
    for name, kept in few.kept.items():
        assert all(torch.equal(indices, whole.kept[name][part]) for part, indices in kept.items())
    monkeypatch.setattr(cache_plan, "free_bytes", lambda device: 0.5 * work[-1])
    with pytest.raises(UserError, match=r"--search_images all: found 0\.0 GB of free RAM"):
        run(MGP, folder, tmp_path / "none", words)
    assert not (tmp_path / "none" / "search.jsonl").exists()


@pytest.mark.parametrize("variant", rest_in_soak([*VARIANTS], ["deformable"]), indirect=True)
def test_a_search_is_resumed_in_the_precision_that_it_began_with(variant, tmp_path, monkeypatch):
    folder, network = variant
    words = f"{network} {SEARCHES['fast']}"
    with monkeypatch.context() as patch:
        patch.setattr(CachePlanner, "_limit", lambda planner, *given: 1.0)
        begun = run(MGP, folder, tmp_path, words)
    journal = tmp_path / "search.jsonl"
    lines = journal.read_text().splitlines()
    assert json.loads(lines[0])["args"]["cache_dtype"] == "bfloat16"
    journal.write_text("\n".join(lines[:2]) + "\n")
    resumed = run(MGP, folder, tmp_path, f"{words} --resume_search")
    assert (resumed.widths, resumed.ap) == (begun.widths, begun.ap)
    with pytest.raises(UserError, match=r"found a search with args\.cache_dtype 'bfloat16', expected 'same'"):
        journal.write_text("\n".join(lines[:2]) + "\n")
        run(MGP, folder, tmp_path, f"{words} --resume_search --cache_dtype same")


def test_the_cache_follows_the_options(tmp_path):
    config = SearchConfig(cache_gb=2.5, search_images=7, resume_search=True)
    journal = tmp_path / "search.jsonl"
    assert cache_options(config, journal) == CacheOptions(2.5, None, None, "--search_images 7")
    journal.write_text(json.dumps({"event": "start", "args": {"cache_dtype": "same"}}) + "\n")
    assert cache_options(config, journal).dtype == "same"
    for damaged in ({}, {"args": None}, {"args": [1]}):
        journal.write_text(json.dumps({"event": "start", **damaged}) + "\n")
        assert cache_options(config, journal).dtype is None
    config = dataclasses.replace(config, cache_dtype="bfloat16", cache_device="cpu")
    assert cache_options(config, journal) == CacheOptions(2.5, "bfloat16", CPU, "--search_images 7")
