"""Pictures of detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from util.files import write_atomic

PALETTE = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe")
CAPTION_HEIGHT = 24
GAP = 6


def draw_detections(
    image: Tensor,
    result: Mapping[str, Tensor],
    names: Mapping[int, str],
    *,
    threshold: float = 0.5,
    scale: int = 1,
) -> Image.Image:
    """A picture of `image` with its boxes, names and scores.

    Args:
        image: RGB, uint8 3 x H x W.
        result: `scores` (K), `labels` (K, category ids), `boxes` (K x 4 xyxy in the image's pixels).
        names: category name by id; an id without one is shown as a number.
        threshold: least score that is drawn.
        scale: whole factor that the picture is enlarged by, so that small ones can be read.
    """
    height, width = image.shape[1:]
    canvas = to_pil_image(image).resize((width * scale, height * scale), Image.Resampling.LANCZOS)
    keep = result["scores"] >= threshold
    if not bool(keep.any()):
        return canvas
    labels = result["labels"][keep].tolist()
    texts = [
        f"{names.get(label, label)} {score:.2f}"
        for label, score in zip(labels, result["scores"][keep].tolist(), strict=True)
    ]
    limits = torch.tensor([canvas.width - 1, canvas.height - 1] * 2)
    boxes = torch.minimum((result["boxes"][keep].cpu() * scale).clamp(min=0), limits)
    # A box that a clamp left without area cannot be drawn.
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    colours = [PALETTE[label % len(PALETTE)] for label in labels]
    return to_pil_image(draw_bounding_boxes(pil_to_tensor(canvas), boxes, texts, colours, width=2))


def write_grid(path: str | Path, columns: Sequence[tuple[str, Sequence[Image.Image]]]) -> None:
    """Write a PNG with one captioned column of pictures beside the other; a column may be shorter or empty."""
    widths = [max((picture.width for picture in pictures), default=0) for _, pictures in columns]
    heights = [
        max(picture.height for picture in row if picture is not None)
        for row in zip_longest(*(pictures for _, pictures in columns))
    ]
    width, height = sum(widths) + GAP * (len(widths) + 1), CAPTION_HEIGHT + sum(heights) + GAP * len(heights)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = GAP
    for (caption, pictures), column_width in zip(columns, widths, strict=True):
        draw.text((left, GAP), caption, fill="black", font_size=14)
        top = CAPTION_HEIGHT
        for picture, row_height in zip(pictures, heights, strict=False):
            sheet.paste(picture, (left, top))
            top += row_height + GAP
        left += column_width + GAP
    write_atomic(path, lambda stream: sheet.save(stream, format="PNG"))
