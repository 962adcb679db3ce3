"""Pictures of detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageColor, ImageDraw
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
    font_size: int | None = None,
) -> Image.Image:
    """A picture of `image` with its boxes, names and scores.

    Args:
        image: RGB, uint8 3 x H x W.
        result: `scores` (K), `labels` (K, category ids), `boxes` (K x 4 xyxy in the image's pixels); annotated objects
            come without scores.
        names: category name by id; an id without one is shown as a number.
        threshold: least score that is drawn.
        scale: whole factor that the picture is enlarged by, so that small ones can be read.
        font_size: height of the names in pixels of the picture, on a ground of their box's colour; None for small ones.
    """
    height, width = image.shape[1:]
    canvas = to_pil_image(image).resize((width * scale, height * scale), Image.Resampling.LANCZOS)
    labels, scores = result["labels"], result.get("scores")
    keep = torch.ones_like(labels, dtype=torch.bool) if scores is None else scores >= threshold
    if not bool(keep.any()):
        return canvas
    labels = labels[keep].tolist()
    numbers = [""] * len(labels) if scores is None else [f" {score:.2f}" for score in scores[keep].tolist()]
    texts = [f"{names.get(label, label)}{number}" for label, number in zip(labels, numbers, strict=True)]
    limits = torch.tensor([canvas.width - 1, canvas.height - 1] * 2)
    boxes = torch.minimum((result["boxes"][keep].cpu() * scale).clamp(min=0), limits)
    # A box that a clamp left without area cannot be drawn.
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    colours = [PALETTE[label % len(PALETTE)] for label in labels]
    style = {} if font_size is None else _legible(colours, font_size)
    return to_pil_image(draw_bounding_boxes(pil_to_tensor(canvas), boxes, texts, colours, width=2, **style))


def _legible(colours: Sequence[str], font_size: int) -> dict[str, Any]:
    """Options of `draw_bounding_boxes` for names in the font that comes with matplotlib, dark or light on `colours`."""
    import matplotlib

    luminances = [ImageColor.getcolor(colour, "L") for colour in colours]
    return {
        "font": str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")),
        "font_size": font_size,
        "label_colors": ["black" if luminance > 128 else "white" for luminance in luminances],
        "label_background_colors": list(colours),
        "fill_labels": True,
    }


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
