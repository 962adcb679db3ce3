"""The cost of a search on a tiny detector: what is counted, and extrapolation from a sample of steps."""

import dataclasses

import pytest

from bench import search_cost
from bench.subject import Subject
from models.widths import Widths
from pruning.schedule import MGP
from tests.tiny_run import write_self_annotated
from util.errors import UserError

IMAGES, WIDTH, UNIT = 2, 32, {True: 4, False: 16}
PUBLISHED = Widths.parse("[[[16,16]],[[8,32,32],[32,16,16]]]")
SAMPLE = ["decoder.1.cross_attention", "encoder.0.ffn"]
STRICT = dataclasses.replace(MGP, map_tol=0.0, skip=0.0)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = write_self_annotated(tmp_path_factory.mktemp("cost"))
    return Subject(str(folder), str(folder / "dense.pth"), train_images=1, search_images=IMAGES, batch_size=IMAGES)


def run(subject, search, sample=(), steps=1):
    return search_cost.run_search(subject, search, STRICT, 0, (sample, steps), (2.0, 1.0))


def test_a_sampled_search_costs_its_steps_to_the_published_widths_and_a_map_for_each_module(subject, monkeypatch):
    monkeypatch.setattr(search_cost, "MGP_WIDTHS", PUBLISHED)
    found = run(subject, "paper", SAMPLE)
    # Each candidate is one image pass of the batch, then comes the subset's mAP; nothing passes after one unit.
    of_a_step = WIDTH * IMAGES + IMAGES
    steps = sum(width / UNIT[not name.endswith("ffn")] for name, width in PUBLISHED.items())
    assert found["whole_passes"] == IMAGES + steps * of_a_step + len(dict(PUBLISHED.items())) * IMAGES
    assert found["cpu_seconds"] > 0
    assert (found["ap"], found["removed"], found["widths"]) == (None, None, None)
    assert found["gmacs_original"] == 3.0 * found["whole_passes"]


def test_every_pass_of_the_papers_search_is_a_whole_one_and_the_backbone_runs_once(subject):
    found = run(subject, "paper")
    assert found["gmacs"] == 2.0 * IMAGES + found["whole_passes"]
    assert found["backbone_images"] == IMAGES
    assert found["sample"] == []
    assert 0 <= found["removed"] < 1


def test_a_search_of_our_own_counts_a_part_of_the_network_as_its_share(subject):
    found = run(subject, "fast")
    assert found["gmacs_original"] / 3.0 > found["whole_passes"] > 2 * IMAGES
    assert found["gmacs"] > 2.0 * IMAGES + found["whole_passes"]  # sums for the fits


@pytest.mark.parametrize("sample", [["encoder.0.ffn"], ["encoder.0.ffn", "encoder.0.attention", "encoder.9.ffn"]])
def test_a_sample_needs_an_attention_and_an_ffn(subject, monkeypatch, sample):
    monkeypatch.setattr(search_cost, "MGP_WIDTHS", PUBLISHED)
    with pytest.raises(UserError, match="--sample"):
        run(subject, "paper", sample)


def test_the_published_widths_are_of_six_and_six_layers(subject):
    with pytest.raises(UserError, match=r"--sample: .* 6 \+ 6 layers"):
        run(subject, "paper", SAMPLE)
