"""Fine-tune a detector on other classes: choose which weights to load and which to initialise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.config import DetectorConfig
from util.checkpoint import rename_encoder_attention
from util.errors import UserError, shorten
from weights.checkpoint_file import Checkpoint

CLASS_HEADS = ("class_embed.",)  # a row per class; the deformable variant has a head per layer
LABEL_ENCODING = "label_enc.weight"  # as above, and a last row for "no object yet", the matching queries' content
SHOWN_NAMES = 5


def class_difference(checkpoint: Checkpoint, num_classes: int, categories: Mapping[int, str]) -> str | None:
    """Return how a checkpoint's classes differ from the annotations', as `found ..., expected ...`, or None.

    A checkpoint may have more categories than the annotations if the number of classes is the same.
    """
    if checkpoint.num_classes != num_classes:
        return (
            f"found a checkpoint for {checkpoint.num_classes} classes, expected {num_classes}, the largest category "
            "id + 1 in the annotations"
        )
    theirs = checkpoint.categories or {}
    for number, name in categories.items() if theirs else ():
        known = theirs.get(number)
        if known != name:
            known = "no such category" if known is None else shorten(known, 80)
            return (
                f"found {known} as category {number} of the checkpoint, expected {shorten(name, 80)} as in the "
                "annotations"
            )
    return None


def matching_categories(checkpoint: Checkpoint, categories: Mapping[int, str]) -> dict[int, int]:
    """Map ids in the annotations to ids in the checkpoint by category name, without names that occur twice."""
    theirs = _ids_by_name(checkpoint.categories or {})
    return {number: theirs[name] for name, number in _ids_by_name(categories).items() if name in theirs}


def _ids_by_name(categories: Mapping[int, str]) -> dict[str, int]:
    names = list(categories.values())
    return {name: number for number, name in categories.items() if names.count(name) == 1}


@dataclass(frozen=True)
class NewParts:
    """Weights of a checkpoint that are not loaded: the model keeps its initial values.

    Attributes:
        matches: for new class heads, class -> class of the checkpoint whose rows are copied; else None.
        ignored: names in the checkpoint of weights that are not loaded.
        summary: line for the log.
    """

    matches: dict[int, int] | None
    ignored: frozenset[str]
    summary: str

    def fill(self, state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return the checkpoint's weights, with `model`'s for those not loaded, for `load_weights`."""
        initial = rename_encoder_attention(model.state_dict(), slim=False)
        found = rename_encoder_attention(state_dict, slim=False)
        ignored = rename_encoder_attention(dict.fromkeys(self.ignored), slim=False).keys()
        if self.matches is not None:
            found |= {key: self._head(found[key], value, key) for key, value in initial.items() if _is_head(key, found)}
        # The one box head has two names in the state dict.
        places = {initial[key].data_ptr() for key in ignored if key in initial}
        initial_ones = {key: value for key, value in initial.items() if value.data_ptr() in places}
        return {key: value for key, value in found.items() if key not in ignored} | initial_ones

    def _head(self, found: Tensor, initial: Tensor, key: str) -> Tensor:
        """Return the checkpoint's rows for classes that both have, and initial ones for the others."""
        if found.shape[1:] != initial.shape[1:]:
            return found  # of another detector: `load_weights` raises
        head = initial.clone()
        for new, old in (self.matches or {}).items():
            head[new] = found[old]
        if key == LABEL_ENCODING:
            head[-1] = found[-1]
        return head


def _is_head(key: str, found: Mapping[str, Tensor]) -> bool:
    return (key == LABEL_ENCODING or key.startswith(CLASS_HEADS)) and key in found


def find_new_parts(
    ignore: Sequence[str], config: DetectorConfig, checkpoint: Checkpoint | None, *, evaluating: bool, continuing: bool
) -> NewParts | None:
    """Return the weights not to load because of `--finetune_ignore` or other classes; None to load all.

    Args:
        ignore: parts of the names of weights not to load.
        config: the detector to train, with its classes.

    Raises:
        UserError: --finetune_ignore is given but nothing is fine-tuned, or no weight has such a name.
    """
    if ignore and (checkpoint is None or evaluating or continuing):
        found = "no --resume" if checkpoint is None else "--eval" if evaluating else "a training run to continue"
        raise UserError(f"--finetune_ignore: found {found}, expected a checkpoint to fine-tune (--start_fresh)")
    if checkpoint is None or evaluating or continuing:
        return None
    names = {old: (old, new) for old in checkpoint.state_dict for new in rename_encoder_attention({old: None}, False)}
    for key in ignore:
        if not key or not any(key in name for both in names.values() for name in both):
            raise UserError(
                f"--finetune_ignore {key}: found no weight of that name in {checkpoint.path}, expected a part of one, "
                "such as class_embed"
            )
    ignored = frozenset(old for old, both in names.items() if any(key in name for key in ignore for name in both))
    matches = None
    if class_difference(checkpoint, config.num_classes, config.categories or {}) is not None:
        matches = matching_categories(checkpoint, config.categories or {})
    if matches is None and not ignored:
        return None
    parts = [] if matches is None else [_new_heads(checkpoint, config, matches)]
    parts += [f"{len(ignored)} weights left out by --finetune_ignore {' '.join(ignore)}"] if ignored else []
    return NewParts(matches, ignored, f"{checkpoint.path}: {'; '.join(parts)}")


def _new_heads(checkpoint: Checkpoint, config: DetectorConfig, matches: Mapping[int, int]) -> str:
    categories = config.categories or {}
    heads = f"new class heads for {config.num_classes} classes in place of those for {checkpoint.num_classes}"
    if checkpoint.categories is None:
        return f"{heads}, none carried over, as the checkpoint has no category names"
    names = [categories[number] for number in matches]
    shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
    carried = f"{len(names)} of {len(categories)} categories carried over by name"
    return f"{heads}, {carried}{f' ({shown})' if shown else ''}"
