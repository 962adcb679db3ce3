"""What is not finite in a calibration ends a search in every process, by one sentence that names module and images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from util import distributed
from util.errors import NonFiniteLossError, reason_of

T = TypeVar("T")


def are_finite(tensors: Iterable[Any]) -> bool:
    """Whether no value of the floating-point tensors among these is infinite or NaN."""
    return all(
        bool(torch.isfinite(tensor).all())
        for tensor in tensors
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    )


def image_ids(targets: Sequence[Any]) -> list[int]:
    """Ids of the images of a batch."""
    return [int(target["image_id"]) for target in targets]


def check_everywhere(bad_images: Mapping[str, Collection[int]]) -> None:
    """End every process if one has met something that is not finite; all processes must call it.

    Args:
        bad_images: what may be infinite or NaN, such as "the loss is", to ids of the images of which it was; the first
            with any is named.

    Raises:
        NonFiniteLossError: in every process, naming the images of all.
    """
    parts = distributed.gather_objects({what: list(images) for what, images in bad_images.items() if images})
    for what in bad_images:
        if found := sorted({image for part in parts for image in part.get(what, [])}):
            raise NonFiniteLossError(f"calibration: {what} not finite, on the images {found}")


def decided_on_main(what: str, fit: Callable[[], T], numbers_of: Callable[[T], Iterable[Tensor]]) -> T:
    """What `fit` gives in the main process, in every process, so that all have the same bits.

    Args:
        what: is fitted, for the error.
        numbers_of: the tensors of the outcome, which have to be finite.

    Raises:
        NonFiniteLossError: in every process, where the fit fails or gives what is not finite.
    """

    def checked() -> T:
        try:
            outcome = fit()
        except torch.linalg.LinAlgError as error:
            raise NonFiniteLossError(f"calibration: {what} failed ({reason_of(error)})") from None
        if not are_finite(numbers_of(outcome)):
            raise NonFiniteLossError(f"calibration: {what} is not finite")
        return outcome

    return distributed.on_main(checked)
