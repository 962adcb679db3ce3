"""Fine-tuning a detector on other classes: what of a checkpoint's weights is left out, and what takes its place."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from util.checkpoint import rename_encoder_attention
from util.errors import UserError, shorten
from weights.checkpoint_file import Checkpoint

CLASS_HEADS = ("class_embed.",)  # a row for each class; the deformable variant has a head for each layer
LABEL_ENCODING = "label_enc.weight"  # the same, and a last row for "no object yet", the matching queries' content
SHOWN_NAMES = 5


def class_difference(checkpoint: Checkpoint, num_classes: int, categories: Mapping[int, str]) -> str | None:
    """How a checkpoint's classes are not those of the annotations, as `found ..., expected ...`; None where they are.

    A checkpoint may know more categories than the annotations name, as long as the number of classes is the same.
    """
    if checkpoint.num_classes != num_classes:
        return (
            f"found a checkpoint for {checkpoint.num_classes} classes, expected {num_classes}, the largest category "
            "id + 1 in the annotations"
        )
    for number, name in categories.items() if checkpoint.categories is not None else ():
        known = checkpoint.categories.get(number)
        if known != name:
            known = "no such category" if known is None else shorten(known, 80)
            return (
                f"found {known} as category {number} of the checkpoint, expected {shorten(name, 80)} as in the "
                "annotations"
            )
    return None


def matching_categories(checkpoint: Checkpoint, categories: Mapping[int, str]) -> dict[int, int]:
    """Id in the annotations -> id in the checkpoint of the category of the same name; names that come twice are out."""
    theirs = _ids_by_name(checkpoint.categories or {})
    return {number: theirs[name] for name, number in _ids_by_name(categories).items() if name in theirs}


def _ids_by_name(categories: Mapping[int, str]) -> dict[str, int]:
    names = list(categories.values())
    return {name: number for number, name in categories.items() if names.count(name) == 1}


@dataclass(frozen=True)
class NewParts:
    """What of a checkpoint begins anew, with the initial values of the model that is trained.

    Attributes:
        matches: where the class heads begin anew, new class -> the checkpoint's class whose rows it takes over; else
            None.
        ignored: weights of the checkpoint that are left out, by its names for them.
        told: one line on it.
    """

    matches: dict[int, int] | None
    ignored: frozenset[str]
    told: str

    def fill(self, state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The checkpoint's weights with `model`'s own where they begin anew; to be loaded by `load_weights`."""
        initial = rename_encoder_attention(model.state_dict(), slim=False)
        found = rename_encoder_attention(state_dict, slim=False)
        ignored = rename_encoder_attention(dict.fromkeys(self.ignored), slim=False).keys()
        if self.matches is not None:
            found |= {key: self._head(found[key], value, key) for key, value in initial.items() if _is_head(key, found)}
        # The box head has two names in the state dict, and is one.
        places = {initial[key].data_ptr() for key in ignored if key in initial}
        anew = {key: value for key, value in initial.items() if value.data_ptr() in places}
        return {key: value for key, value in found.items() if key not in ignored} | anew

    def _head(self, found: Tensor, initial: Tensor, key: str) -> Tensor:
        """Rows of the classes that both know, and initial ones for the others."""
        if found.shape[1:] != initial.shape[1:]:
            return found  # of another detector, which `load_weights` tells
        head = initial.clone()
        for new, old in self.matches.items():
            head[new] = found[old]
        if key == LABEL_ENCODING:
            head[-1] = found[-1]
        return head


def _is_head(key: str, found: Mapping[str, Tensor]) -> bool:
    return (key == LABEL_ENCODING or key.startswith(CLASS_HEADS)) and key in found


def find_new_parts(args: argparse.Namespace, checkpoint: Checkpoint | None, continuing: bool) -> NewParts | None:
    """What `--finetune_ignore` and other classes leave out of the checkpoint; None where all of it is taken.

    Args:
        args: as `settle_arguments` left them.

    Raises:
        UserError: --finetune_ignore where nothing is fine-tuned, or with a name that no weight has.
    """
    keys = args.finetune_ignore or ()
    if keys and (checkpoint is None or args.eval or continuing):
        found = "no --resume" if checkpoint is None else "--eval" if args.eval else "a training run to go on with"
        raise UserError(f"--finetune_ignore: found {found}, expected a checkpoint to fine-tune (--start_fresh)")
    if checkpoint is None or args.eval or continuing:
        return None
    names = {old: (old, new) for old in checkpoint.state_dict for new in rename_encoder_attention({old: None}, False)}
    for key in keys:
        if not key or not any(key in name for both in names.values() for name in both):
            raise UserError(
                f"--finetune_ignore {key}: found no weight of that name in {checkpoint.path}, expected a part of one, "
                "such as class_embed"
            )
    ignored = frozenset(old for old, both in names.items() if any(key in name for key in keys for name in both))
    matches = None
    if class_difference(checkpoint, args.num_classes, args.categories) is not None:
        matches = matching_categories(checkpoint, args.categories)
    if matches is None and not ignored:
        return None
    told = [] if matches is None else [_tell_heads(checkpoint, args, matches)]
    told += [f"{len(ignored)} weights left out by --finetune_ignore {' '.join(keys)}"] if ignored else []
    return NewParts(matches, ignored, f"{checkpoint.path}: {'; '.join(told)}")


def _tell_heads(checkpoint: Checkpoint, args: argparse.Namespace, matches: Mapping[int, int]) -> str:
    heads = f"new class heads for {args.num_classes} classes in place of those for {checkpoint.num_classes}"
    if checkpoint.categories is None:
        return f"{heads}, none carried over, as it does not tell its categories' names"
    names = [args.categories[number] for number in matches]
    shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
    carried = f"{len(names)} of {len(args.categories)} categories carried over by name"
    return f"{heads}, {carried}{f' ({shown})' if shown else ''}"
