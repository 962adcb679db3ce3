"""Damaged folders of `save_pretrained` are read, or refused in one sentence; no code in them runs."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trust.mutations import FUZZ, VALUES, damaged_bytes, damaged_value
from tests.trust.test_fuzz_checkpoint import CALLS, little_memory  # noqa: F401
from tests.trust.test_fuzz_text import value_or_sentence
from tests.weights.test_save_pretrained import NETWORKS, read, share, write_checkpoint
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder; not to be changed."""
    root = tmp_path_factory.mktemp("pretrained")
    write_checkpoint(root / "a.pth", *NETWORKS["slim"])
    share(root / "a.pth", root / "shared")
    return root / "shared"


@pytest.fixture
def folder(shared, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(shared, tmp_path / "copy", dirs_exist_ok=True))


@FUZZ
@given(data=st.data())
def test_configs_of_other_values(folder, data):
    path = folder / "config.json"
    content = json.loads((folder.parent / "whole.json").read_text()) if (folder.parent / "whole.json").exists() else {}
    if not content:
        shutil.copy(path, folder.parent / "whole.json")
        content = json.loads(path.read_text())
    values = st.one_of(VALUES, st.sampled_from([10**9, 10**12, 10**18, 2, 7, 1e18]))
    part = data.draw(st.sampled_from(["args", "widths", "all"]))
    if part == "all":
        content = data.draw(damaged_value(content, values))
    else:
        content = {**content, part: data.draw(damaged_value(content[part], values))}
    path.write_text(json.dumps(content), encoding="utf-8", errors="backslashreplace")
    value_or_sentence(lambda: read(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@FUZZ
@given(data=st.data())
def test_files_of_damaged_bytes(shared, folder, name, data):
    whole = (shared / name).read_bytes()
    head = whole[:4000]  # of model.safetensors, the length and part of the names
    (folder / name).write_bytes(data.draw(damaged_bytes(head)) + whole[4000:])
    value_or_sentence(lambda: read(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("call", ["os.system", "exec", "torch.load"])
def test_no_code_in_a_folder_runs(folder, tmp_path, name, call):
    marker = tmp_path / "it_ran"
    if name == "pytorch_model.bin":  # read where there is no safetensors, but only tensors in it
        (folder / "model.safetensors").unlink()
    for content in (pickle.dumps(CALLS[call](marker)), None):
        if content is None:
            torch.save({"model": CALLS[call](marker)}, folder / name)
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            read_checkpoint(folder)
        assert "\n" not in str(error.value) and not marker.exists()
