"""Our checkpoints store the category names of their detectors."""

import pytest
import torch

from models.widths import Widths
from tests.pruning.tiny import tiny_args, tiny_detector
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint, save_checkpoint
from weights.strip_optimizer import strip_optimizer

FULL = Widths.dense(1, 2, 32, 32)
NAMES = {1: "cat", 6: "dog"}


def saved(path, **more) -> None:
    """A tiny detector's checkpoint."""
    save_checkpoint(path, state_dict=tiny_detector()[0].state_dict(), widths=FULL, full_widths=FULL,
                    arguments=vars(tiny_args()), num_classes=7, **more)  # fmt: skip


@pytest.mark.parametrize("training", [None, {"optimizer": {}, "epoch": 1}])
def test_names_are_read_back_and_kept_by_strip_optimizer(training, tmp_path):
    saved(tmp_path / "a.pth", categories=NAMES, training=training)
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.categories == NAMES and checkpoint.training == training
    strip_optimizer(tmp_path / "a.pth", tmp_path / "b.pth", half=True)
    assert read_checkpoint(tmp_path / "b.pth").categories == NAMES


def test_files_without_names_are_read_as_before(tmp_path):
    saved(tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    del content["categories"]
    torch.save(content, tmp_path / "older.pth")
    torch.save({"model": content["model"]}, tmp_path / "foreign.pth")
    for name in ("a", "older", "foreign"):
        assert read_checkpoint(tmp_path / f"{name}.pth").categories is None


@pytest.mark.parametrize("categories", [[1], {}, {"1": "cat"}, {-1: "cat"}, {1: 5}, {True: "cat"}])
def test_invalid_category_names_are_an_error(categories, tmp_path):
    saved(tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save({**content, "categories": categories}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: found .* under `categories`, expected names by id"):
        read_checkpoint(tmp_path / "a.pth")
