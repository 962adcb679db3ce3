"""AP and boxes depend on neither the batch size nor the number of processes: evaluation, searches and inference."""

import itertools
import json
import sys
from pathlib import Path

import pytest

import inference
from datasets.coco import annotation_path
from tests.pruning.tiny import VARIANTS
from tests.soak import rest_in_soak
from tests.tiny_run import write_self_annotated
from tests.trust.forked import job, run_jobs
from util.cli import parse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")

# Processes and images in a batch of each; seven images, 64 or 80 pixels wide at stride 16 or 32.
CASES = {"all": ((1, 1), (1, 3), (1, 7), (2, 2), (3, 2)), "few": ((1, 1), (1, 7), (2, 2))}
# Of those, in which both searches measure the dense detector.
SEARCHED = {
    "all": tuple(itertools.product(("gp", "mgp"), ((1, 3), (2, 2)))),
    "few": (("gp", (2, 2)), ("mgp", (1, 3))),
}
NETWORKS = {**VARIANTS, "dense": "--backbone resnet18"}  # with a tiny backbone the dense detector's AP is below 0.4
SEARCH = "--keep 0.9 --calibration_images 2 --search_split val2017"


def read(path: Path):
    return json.loads(path.read_text())


def assert_same_boxes(out: Path, other: Path) -> None:
    """The results of two runs have the same detections: no box moves by a tenth of a pixel."""
    found, expected = (
        sorted(read(path / "results.json"), key=lambda d: (d["image_id"], d["category_id"], d["score"]))
        for path in (out, other)
    )
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-4), out.name
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.1), out.name


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("amount", rest_in_soak([*CASES], ["few"]))
def test_ap_and_boxes_are_those_of_images_alone(network, amount, tmp_path):
    root = write_self_annotated(tmp_path / "data", network)
    common = f"--coco_path {root} --resume {root}/dense.pth --num_workers 0 --device cpu"
    jobs = []
    for processes, batch_size in CASES[amount]:
        words = f"{common} --batch_size {batch_size} --output_dir {tmp_path}/main{processes}{batch_size}"
        jobs.append(job(processes, "main", f"{words} --eval --save_results"))
    for script, (processes, batch_size) in SEARCHED[amount]:
        words = f"{common} --batch_size {batch_size} --output_dir {tmp_path}/{script}{processes}{batch_size}"
        jobs.append(job(processes, script, f"{words} {SEARCH}"))
    run_jobs(tmp_path / "jobs.json", jobs)
    alone = read(tmp_path / "main11" / "eval.json")["AP"]
    assert alone > 0.4
    for processes, batch_size in CASES[amount][1:]:
        out = tmp_path / f"main{processes}{batch_size}"
        assert read(out / "eval.json")["AP"] == pytest.approx(alone, abs=5e-4), out.name
        assert_same_boxes(out, tmp_path / "main11")
    for script, (processes, batch_size) in SEARCHED[amount]:
        path = tmp_path / f"{script}{processes}{batch_size}" / "search.jsonl"
        base_ap = json.loads(path.read_text().splitlines()[0])["base_ap"]
        assert base_ap == pytest.approx(alone, abs=5e-4), path
    for batch_size in (1, 7) if amount == "all" else (7,):
        out = tmp_path / f"inference{batch_size}"
        words = f"{root}/val2017 --resume {root}/dense.pth --names {annotation_path(root, 'val2017')} --num_workers 0"
        words = f"{words} --device cpu --batch_size {batch_size} --output_dir {out}"
        inference.main(*parse(inference.get_inference_parser(), words.split()))
        assert_same_boxes(out, tmp_path / "main11")
