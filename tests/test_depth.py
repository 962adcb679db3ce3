"""Runs with the first decoder layers of a checkpoint, and AP after each layer."""

import json
from pathlib import Path

import pytest

import export
import inference
import main
from tests.pruning.tiny import VARIANTS
from tests.test_main import SLOW
from tests.tiny_run import options, write_self_annotated
from util.cli import parse
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint


@pytest.fixture(scope="module", params=VARIANTS)
def root(request, tmp_path_factory) -> Path:
    """A data set annotated by its detector dense.pth, which has three decoder layers."""
    return write_self_annotated(tmp_path_factory.mktemp(request.param), f"{VARIANTS[request.param]} --dec_layers 3")


def evaluate(root: Path, out: Path, *words: str | Path) -> tuple[dict, dict, str]:
    """Metrics, eval.json and run.log of an evaluation."""
    stats = main.main(*options("--coco_path", root, "--output_dir", out, "--num_workers 0 --device cpu --batch_size 2",
                               "--eval --resume", root / "dense.pth", *words))  # fmt: skip
    return stats, json.loads((out / "eval.json").read_text()), (out / "run.log").read_text()


def test_ap_after_each_layer_is_that_of_the_detector_with_so_many(root, tmp_path):
    stats, content, log = evaluate(root, tmp_path / "all", "--ap_by_layer")
    by_layer = content["by_decoder_layer"]
    assert len(by_layer) == 3 and by_layer[-1] == stats and "decoder layers" in log
    assert len({of_layer["AP"] for of_layer in by_layer}) == 3
    for count in (1, 2, 3):
        fewer, content, log = evaluate(root, tmp_path / f"{count}", f"--dec_layers {count}")
        assert fewer == by_layer[count - 1] and len(content["widths"][1]) == count
        assert "by_decoder_layer" not in content
        assert (f"dense.pth: using the first {count} of its 3 decoder layers" in log) == (count < 3)


def test_fine_tuning_the_first_layers_saves_so_many(root, tmp_path):
    if "deformable" in str(root):
        pytest.skip("one variant is enough")
    common = ("--coco_path", root, "--output_dir", tmp_path, SLOW, "--batch_size 2")
    teacher = ("--use_dn --distill", root / "dense.pth")
    main.main(*options(*common, "--epochs 1 --dec_layers 2 --resume", root / "dense.pth", *teacher))
    found = read_checkpoint(tmp_path / "checkpoint.pth")
    assert found.arguments["dec_layers"] == 2 and len(found.widths.decoder) == len(found.full_widths.decoder) == 2
    assert not any("decoder.layers.2." in key for key in found.state_dict)
    line = json.loads((tmp_path / "log.txt").read_text().splitlines()[0])
    assert line["train_loss_distill_logits_0"] < 1e-3 < line["train_loss_distill_logits"]
    assert line["train_tgt_loss_ce_0"] > 0 and "train_loss_ce_1" not in line
    assert "the last of 2 decoder layers learns from the last of the teacher's 3" in (tmp_path / "run.log").read_text()
    main.main(*options(*common, "--epochs 2 --resume", tmp_path / "checkpoint.pth"))
    assert read_checkpoint(tmp_path / "checkpoint.pth").training["epoch"] == 2
    with pytest.raises(UserError, match=r"^--dec_layers 1: .*run of 2 decoder layers, which cannot continue with"):
        main.main(*options(*common, "--epochs 3 --dec_layers 1 --resume", tmp_path / "checkpoint.pth"))
    main.main(*options(*common, "--epochs 1 --dec_layers 1 --start_fresh --resume", tmp_path / "checkpoint.pth"))
    assert len(read_checkpoint(tmp_path / "checkpoint.pth").widths.decoder) == 1


def test_inference_and_export_use_the_first_layers(root, tmp_path, monkeypatch):
    found = {}

    class Built(Exception):
        """Ends a script once its detector is built."""

    def keep(model, *_, **__):
        found["export"] = model
        raise Built

    monkeypatch.setattr(export, "export", keep)
    words = f"--resume {root}/dense.pth --dec_layers 2 --output_dir {tmp_path}"
    with pytest.raises(Built):
        export.main(*parse(export.get_export_parser(), words.split()))
    assert len(found["export"].transformer.decoder.layers) == 2
    words = f"{root}/val2017/0.jpg --device cpu --num_workers 0 {words}"
    inference.main(*parse(inference.get_inference_parser(), words.split()))
    assert "using the first 2 of its 3 decoder layers" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--dec_layers 4 --eval", r"^--dec_layers 4: .* has 3 decoder layers, expected 1 to 3$"),
        ("--ap_by_layer", r"^--ap_by_layer: found no --eval, expected --eval --ap_by_layer$"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(root, tmp_path, words, told):
    with pytest.raises(UserError, match=told):
        main.main(*options("--coco_path", root, "--output_dir", tmp_path, "--resume", root / "dense.pth", words))
    assert not list(tmp_path.iterdir())
