"""Our safetensors checkpoints: files are read back as written, and hostile files give a one-line error."""

import json
import sys

import pytest
import torch

from models.widths import Widths
from tests.pruning.tiny import VARIANTS, pictures, tiny_args, tiny_detector
from tests.tiny_run import tiny_options, write_coco
from util.checkpoint import load_weights
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint, save_checkpoint, slim_state_dict
from weights.safetensors_file import METADATA_KEY

safetensors = pytest.importorskip("safetensors.torch")

KEPT = {"encoder.0.ffn": {"hidden": torch.arange(20)}}
TRACE = [{"module": "encoder.0.ffn", "ap": 0.5}]


def save(path, network="", **more):
    """A tiny detector's checkpoint with its safetensors; returns the detector."""
    model = tiny_detector(network, seed=1)[0].eval()
    content = {"state_dict": model.state_dict(), "widths": model.widths, "full_widths": model.widths,
               "arguments": vars(tiny_args(network)), "num_classes": 7}  # fmt: skip
    save_checkpoint(path, **{**content, **more}, safetensors=True)
    return model


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_checkpoint_is_read_back_without_its_training_state(tmp_path, network):
    model = save(tmp_path / "a.pth", network, training={"optimizer": {}, "epoch": 3})
    found, expected = read_checkpoint(tmp_path / "a.safetensors"), read_checkpoint(tmp_path / "a.pth")
    assert found.training is None and expected.training is not None
    for name in ("kind", "widths", "full_widths", "num_classes", "arguments", "kept", "trace"):
        assert getattr(found, name) == getattr(expected, name)
    again = tiny_detector(network)[0].eval()
    load_weights(again, found.state_dict, found.path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(pictures()[0])["pred_boxes"], model(pictures()[0])["pred_boxes"])


def test_a_search_output_is_read_back_with_its_channels_and_decisions(tmp_path):
    widths = Widths.dense(1, 2, 32, 32).replace("encoder.0.ffn", 20)
    save(tmp_path / "a.pth", widths=widths, kept=KEPT, trace=TRACE)
    found, expected = read_checkpoint(tmp_path / "a.safetensors"), read_checkpoint(tmp_path / "a.pth")
    assert (found.kind, found.widths, found.trace) == ("search", widths, TRACE)
    assert torch.equal(found.kept["encoder.0.ffn"]["hidden"], KEPT["encoder.0.ffn"]["hidden"])
    cut = [slim_state_dict(checkpoint, tiny_detector()[0]) for checkpoint in (found, expected)]
    assert all(torch.equal(cut[0][key], value) for key, value in cut[1].items())


def metadata(**changes) -> dict[str, str]:
    """Metadata of a search's output with some entries changed."""
    widths = Widths.dense(1, 2, 32, 32).to_list()
    about = {"format": "dn-detr-pruning", "version": 1, "widths": widths, "full_widths": widths, "args": {},
             "num_classes": 7, "kept": None}  # fmt: skip
    return {METADATA_KEY: json.dumps({**about, **changes})}


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({METADATA_KEY: "{"}, "no JSON"),
        ({METADATA_KEY: "[" * 100_000}, "no JSON"),
        ({METADATA_KEY: "[1]"}, "found list"),
        (metadata(version=9), "version 9"),
        (metadata(widths="all"), "found str under `widths`"),
        (metadata(widths=[[[1]], []]), "under `widths`"),
        (metadata(num_classes="7"), "found str under `num_classes`"),
        (metadata(kept=[1]), "under `kept`"),
        (metadata(kept={"encoder.0.ffn": [1]}), "under `kept`"),
        (metadata(kept={"encoder.0.ffn": {"hidden": [1.5]}}), r"kept.encoder.0.ffn.hidden`, expected a list of whole"),
        (metadata(kept={"encoder.0.ffn": {"hidden": [10**30]}}), "expected a list of whole"),
        (metadata(kept={"encoder.0.ffn": {"hidden": "all"}}), "expected a list of whole"),
        (metadata(args=[]), "found list under `args`"),
        (metadata(trace=5), "found 5 under `trace`, expected the steps"),
        (metadata(trace=[5]), "expected the steps of a search"),
        ({}, "no key transformer.encoder"),
    ],
)
def test_hostile_metadata_is_an_error(tmp_path, about, message):
    safetensors.save_file({"class_embed.bias": torch.zeros(7)}, tmp_path / "a.safetensors", about)
    with pytest.raises(UserError, match=f"a.safetensors: .*{message}"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_files_are_an_error(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"a.safetensors: "):
        read_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "b.safetensors")


def test_a_missing_package_is_an_error_at_the_start(tmp_path, monkeypatch):
    import main

    data = write_coco(tmp_path / "data", images=2)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        main.main(*tiny_options("--save_safetensors --coco_path", data, "--output_dir", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_training_writes_both_files_and_either_starts_another_run(tmp_path):
    import main

    data = write_coco(tmp_path / "data", images=2)
    main.main(*tiny_options("--save_safetensors --epochs 1 --coco_path", data, "--output_dir", tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"checkpoint.pth", "checkpoint.safetensors", "checkpoint_best.safetensors"} <= names
    figures = [
        main.main(*tiny_options("--eval --coco_path", data, "--output_dir", tmp_path / "eval", "--resume", path))
        for path in (tmp_path / "out" / "checkpoint.pth", tmp_path / "out" / "checkpoint.safetensors")
    ]
    assert figures[0] == figures[1]
