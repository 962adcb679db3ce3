"""Run metadata: the commit, the command, and every start of the run."""

import json
import subprocess
import sys

import torch

from util.environment import environment, program_commit, record_run, typed_command


def test_the_commit_is_that_of_the_clone(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-q", "-m", "first")
    assert program_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "b.py").write_text("not tracked\n")
    assert program_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a.py").write_text("2\n")
    assert program_commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"
    (tmp_path / "unpacked").mkdir()
    assert program_commit(tmp_path / "unpacked") is None


def test_a_command_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--output_dir", "a b", "--cfgs", "[[[8,16]],[]]"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert typed_command() == "python main.py --output_dir 'a b' --cfgs '[[[8,16]],[]]'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert typed_command().startswith("torchrun --nproc_per_node 4 main.py ")


def test_every_start_of_a_run_is_recorded(tmp_path, monkeypatch):
    device = torch.device("cpu")
    for number, continuing in enumerate((False, True, True)):
        monkeypatch.setattr(sys, "argv", ["main.py", str(number)])
        record_run(
            tmp_path,
            {"resume": f"{number}.pth", "lr": 1e-4},
            device,
            "pycocotools 2",
            continuing=continuing,
        )
    found = json.loads((tmp_path / "args.json").read_text())
    assert found["lr"] == 1e-4 and [run["command"][-1] for run in found["runs"]] == ["0", "1", "2"]
    assert [run["resume"] for run in found["runs"]] == ["0.pth", "1.pth", "2.pth"]
    assert {**found["runs"][0]["environment"], "date": ""} == {**environment(device), "date": ""}
    record_run(tmp_path, {"resume": None}, device, "pycocotools 2", continuing=False)
    assert len(json.loads((tmp_path / "args.json").read_text())["runs"]) == 1
    (tmp_path / "args.json").write_text("{damaged")
    record_run(tmp_path, {"resume": None}, device, "pycocotools 2", continuing=True)
    assert len(json.loads((tmp_path / "args.json").read_text())["runs"]) == 1
