"""End a search in every process if a calibration value is not finite, with an error that names module and images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from util import distributed
from util.errors import NonFiniteLossError, reason_of
from util.threads import idle_cores

T = TypeVar("T")


def are_finite(tensors: Iterable[Any]) -> bool:
    """Return whether all floating-point tensors among `tensors` are finite."""
    return all(
        bool(torch.isfinite(tensor).all())
        for tensor in tensors
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    )


class BadImages:
    """Images on which values are not finite. A GPU computes that, and the CPU reads it once, in `found`."""

    def __init__(self) -> None:
        self._flags: list[Tensor] = []
        self._image_ids: list[Callable[[], Collection[int]]] = []

    def note(self, tensors: Iterable[Any], image_ids: Callable[[], Collection[int]]) -> None:
        """Note whether all floating-point tensors among `tensors` are finite; `image_ids` returns their images."""
        flags = [torch.isfinite(t).all() for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
        if flags:
            self._flags.append(torch.stack(flags).all())
            self._image_ids.append(image_ids)

    def found(self) -> set[int]:
        """Return the ids of the images where a value was not finite."""
        if not self._flags:
            return set()
        flags = torch.stack(self._flags).cpu().tolist()
        bad = [ids for ids, is_finite in zip(self._image_ids, flags, strict=True) if not is_finite]
        return {image for ids in bad for image in ids()}


def image_ids(targets: Sequence[Any]) -> list[int]:
    """Return the image ids of a batch."""
    return [int(target["image_id"]) for target in targets]


def check_everywhere(bad_images: Mapping[str, Collection[int]]) -> None:
    """Raise in every process if one has found a value that is not finite; all processes must call this.

    Args:
        bad_images: for each checked value, such as "the loss is", ids of the images where it is not finite; the error
            names the first value with any.

    Raises:
        NonFiniteLossError: in every process, with the images of all.
    """
    parts = distributed.gather_objects({what: list(images) for what, images in bad_images.items() if images})
    for what in bad_images:
        if found := sorted({image for part in parts for image in part.get(what, [])}):
            raise NonFiniteLossError(f"calibration: {what} not finite, on the images {found}")


def checked(what: str, fit: Callable[[], T], numbers_of: Callable[[T], Iterable[Tensor]]) -> T:
    """Run `fit` and return its result.

    Args:
        what: name of the fit in errors.
        numbers_of: returns the tensors of the result that must be finite.

    Raises:
        NonFiniteLossError: the fit fails or its result is not finite.
    """
    try:
        outcome = fit()
    except torch.linalg.LinAlgError as error:
        raise NonFiniteLossError(f"calibration: {what} failed ({reason_of(error)})") from None
    if not are_finite(numbers_of(outcome)):
        raise NonFiniteLossError(f"calibration: {what} is not finite")
    return outcome


def decided_on_main(what: str, fit: Callable[[], T], numbers_of: Callable[[T], Iterable[Tensor]]) -> T:
    """Run `fit` in the main process, on idle cores too, and return its result in every process, bitwise equal.

    Arguments and errors are those of `checked`; an error is raised in every process.
    """

    def on_idle_cores() -> T:
        with idle_cores():
            return checked(what, fit, numbers_of)

    return distributed.on_main(on_idle_cores)
