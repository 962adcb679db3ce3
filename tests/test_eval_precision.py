"""AP is one number: that of the log, of the report and of `--eval`, measured in float32 whatever a run trains in."""

import json
from pathlib import Path

import pytest
import torch

import main
from pruning.schedule import MGP
from reports.samples import Samples
from reports.training_page import training_page
from runs.search_command import get_pruning_parser, search
from tests.tiny_run import options, write_self_annotated
from util.cli import parse

SLOW = "--lr 1e-6 --lr_backbone 1e-6 --weight_decay 0 --augmentation flip --num_workers 0 --device cpu"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data set that its detector, dense.pth, finds nearly everything in."""
    return write_self_annotated(tmp_path_factory.mktemp("annotated"))


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory) -> Path:
    """Folder of a run of two epochs in bfloat16."""
    out = tmp_path_factory.mktemp("trained")
    main.main(*options("--coco_path", root, "--output_dir", out, "--resume", root / "dense.pth",
                       f"{SLOW} --amp bf16 --ema_decay 0.5 --batch_size 2 --epochs 2"))  # fmt: skip
    return out


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def evaluate(root: Path, checkpoint: Path, out: Path, words: str = "") -> dict:
    """What eval.json holds."""
    main.main(*options("--coco_path", root, "--output_dir", out, "--resume", checkpoint,
                       f"--eval --batch_size 2 --num_workers 0 --device cpu {words}"))  # fmt: skip
    return json.loads((out / "eval.json").read_text())


def test_ap_in_log_report_and_evaluation_is_one_number(root, trained, tmp_path):
    best = max(logged(trained), key=lambda line: line["test_AP"])
    found = evaluate(root, trained / "checkpoint_best.pth", tmp_path)
    assert found["AP"] > 0.1
    assert {name: found[name] for name in ("AP", "AP50", "ARl")} == {
        name: best[f"test_{name}"] for name in ("AP", "AP50", "ARl")
    }
    page = training_page(trained, Samples(torch.device("cpu")))
    assert f"{found['AP']:.4f}" in page
    assert f"AP {found['AP']:.4f} (best)" in (trained / "run.log").read_text()


def test_bfloat16_gives_another_ap_and_is_used_where_it_is_asked_for(root, trained, tmp_path):
    """Which shows that the test above could fail."""
    exact = evaluate(root, trained / "checkpoint_best.pth", tmp_path / "exact")
    rounded = evaluate(root, trained / "checkpoint_best.pth", tmp_path / "rounded", "--eval_amp")
    assert exact["AP"] != rounded["AP"]
    assert (exact["eval_amp"], rounded["eval_amp"]) == ("off", "bf16")
    main.main(*options("--coco_path", root, "--output_dir", tmp_path / "on", "--resume", trained / "checkpoint.pth",
                       "--num_workers 0 --device cpu --epochs 3 --eval_amp bf16"))  # fmt: skip
    last = logged(tmp_path / "on")[-1]
    assert last["epoch"] == 2 and "--eval_amp off -> bf16" in (tmp_path / "on" / "run.log").read_text()
    again = evaluate(root, tmp_path / "on" / "checkpoint.pth", tmp_path / "again", "--eval_amp bf16")
    assert again["AP"] == last["test_AP"]
    assert last["test_AP"] != evaluate(root, tmp_path / "on" / "checkpoint.pth", tmp_path / "float")["AP"]


@pytest.mark.parametrize("kind", ["--keep 0.9", "--search visit --map_tol 0.5 --skip_eval_converge 0.5"])
def test_ap_of_a_search_is_that_of_its_output(root, tmp_path, kind):
    """Up to the rounding of the cut, at most 1e-5 in each output."""
    words = f"--coco_path {root} --resume {root}/dense.pth --search_split val2017 --batch_size 2 --num_workers 0 "
    words += f"--device cpu --attention_unit 4 --ffn_unit 8 {kind}"
    results = {}
    for name, precision in (("float", "--amp bf16"), ("rounded", "--eval_amp bf16")):
        parser = get_pruning_parser(MGP, "a test")
        results[name] = search(
            MGP, *parse(parser, [*words.split(), *precision.split(), "--output_dir", str(tmp_path / name)])
        )
    dense = evaluate(root, root / "dense.pth", tmp_path / "dense")
    assert results["float"].base_ap == pytest.approx(dense["AP"], abs=1e-6) != results["rounded"].base_ap
    found = evaluate(root, results["float"].path, tmp_path / "eval")
    assert found["AP"] == pytest.approx(results["float"].ap, abs=1e-6)
