"""Find the detector that a search pruned, from which its output can learn."""

from __future__ import annotations

from pathlib import Path

import torch

from util.errors import UserError
from weights.checkpoint_file import read_checkpoint
from weights.formats import Checkpoint

# Parts of a detector that no reconstruction changes; a search's output has those of the detector that it pruned.
UNCHANGED = ("label_enc.weight", "refpoint_embed.weight", "bbox_embed.layers.0.weight", "bbox_embed.0.layers.0.weight")


def teacher_of(checkpoint: Checkpoint) -> str | None:
    """Return the file of the detector that a search pruned, if it is known, still there and still that detector."""
    path = checkpoint.arguments.get("resume")
    if not checkpoint.is_search or not isinstance(path, str) or not Path(path).exists():
        return None
    try:
        teacher = read_checkpoint(path)
    except UserError:
        return None
    names = [name for name in UNCHANGED if name in checkpoint.state_dict]
    same = not teacher.is_search and all(
        name in teacher.state_dict
        and torch.equal(teacher.state_dict[name].float(), checkpoint.state_dict[name].float())
        for name in names
    )
    return path if names and same else None
