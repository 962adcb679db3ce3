"""The ablation of the fast search on a tiny detector: each row is another search, and only what it names differs."""

import pytest

from bench import search_parts
from bench.subject import Subject
from pruning import budget
from tests.tiny_run import write_self_annotated


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = write_self_annotated(tmp_path_factory.mktemp("parts"))
    return Subject(str(folder), str(folder / "dense.pth"), train_images=1, search_images=3, batch_size=1)


def test_every_plain_way_finds_a_detector_and_none_is_cheaper(subject):
    rows = search_parts.variants(3)
    rows["as it is"] = {"calibration_images": 1}
    for name in [*rows][1:]:
        if name != "calibrated on all images":
            rows[name]["calibration_images"] = 1
    found = {name: search_parts.run_variant(subject, variant, 0.3) for name, variant in rows.items()}
    plain = found["as it is"]
    for name in ("calibrated on all images", "every width of an attention measured", "budgets halved, seven mAP"):
        assert found[name]["whole_passes"] > plain["whole_passes"], name
    for row in found.values():
        assert 0 < row["removed"] < 1
        assert row["ap"] > 0
    assert budget.ATTENTION_WIDTHS_MEASURED < search_parts.EVERY


def test_rank_correlations_are_those_of_every_ffn(subject):
    found = search_parts.rank_correlations(subject)
    assert set(found) == {name for name in subject.dense.step_names if name.endswith("ffn")}
    assert all(-1 <= value <= 1 for value in found.values())
