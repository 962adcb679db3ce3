"""The benchmark of runtimes: every runtime with every width, in one file, and what is missing is an error."""

import json

import pytest

from bench import runtimes
from models.config import DetectorConfig
from tests.pruning.tiny import tiny_args
from tools import export_timing
from util.errors import UserError


def test_every_runtime_times_the_dense_and_the_slim_detector(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = DetectorConfig.from_values(vars(tiny_args()))
    monkeypatch.setattr(runtimes, "subject_of", lambda name, checkpoint: (config, (64, 96)))
    monkeypatch.setattr(runtimes, "KEPT_SHARES", (0.5,))
    monkeypatch.setattr(export_timing, "has_openvino", lambda: False)
    words = ["--rounds", "1", "--output", str(tmp_path), "--runtimes", "PyTorch", "onnxruntime"]
    runtimes.main([*words, "--subjects", "demo"])
    found = json.loads((tmp_path / "runtimes.json").read_text())
    assert found["environment"]["threads"] == 1 and "onnxruntime" in found["environment"]
    rows = found["subjects"]["demo"]["rows"]
    assert [(row["runtime"], row["detector"]) for row in rows] == [
        ("PyTorch", "dense"), ("onnxruntime", "dense"), ("PyTorch", "50%"), ("onnxruntime", "50%")
    ]  # fmt: skip
    assert all(row["milliseconds"] > 0 for row in rows) and "onnxruntime" in capsys.readouterr().out
    before = runtimes._subjects_before(tmp_path / "runtimes.json", found["environment"] | {"date": "another"})
    assert before == found["subjects"]
    assert runtimes._subjects_before(tmp_path / "runtimes.json", found["environment"] | {"torch": "another"}) == {}


def test_a_missing_runtime_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "has_openvino", lambda: False)
    with pytest.raises(UserError, match=r"found no package openvino, expected it \(pip install '\.\[openvino\]'\)"):
        runtimes.main(["--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
