"""Draw detections as pictures."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from util.errors import one_line
from util.files import write_atomic

PALETTE = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe")
FORMATS: Mapping[str, Mapping[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 92, "subsampling": 0},
}
GAP = 6
LEAST_FONT_SIZE = 10
CAPTION_FONT_SIZE = 14
FONT_SHARE = 45  # longer side of a picture / letter height
LINE_SHARE = 400  # longer side / line width of a box
LABEL_SHARE = 0.4  # of a picture's width: limit of a label wider than its box
LABEL_LETTERS = 12  # limit in letters for narrow pictures, which fit about twice as many
LEAST_LONG_SIDE, LEAST_SHORT_SIDE = 640, 160  # pixels that small images are enlarged to, roughly
MOST_LONG_SIDE = 2560  # limit for long strips

Rectangle = tuple[float, float, float, float]


def draw_detections(
    image: Tensor,
    result: Mapping[str, Tensor],
    names: Mapping[int, str],
    *,
    threshold: float = 0.5,
    scale: int = 1,
) -> Image.Image:
    """Return a picture of `image` with boxes, names and scores.

    Lines and letters scale with the picture. A label is black or white, by contrast, on the colour of its box. It is
    placed inside the picture, where it covers least of the labels of higher scores.

    Args:
        image: RGB, uint8 3 x H x W.
        result: `scores` (K), `labels` (K, category ids), `boxes` (K x 4 xyxy in the image's pixels); annotated objects
        have no scores and are all drawn.
        names: category name by id; an id without a name is shown as a number.
        threshold: lowest score to draw.
        scale: integer factor to enlarge the picture by, to make small ones readable.
    """
    height, width = image.shape[1:]
    canvas = to_pil_image(image).resize((width * scale, height * scale), Image.Resampling.LANCZOS)
    found = _chosen(result, names, threshold)
    draw = ImageDraw.Draw(canvas)
    side = min(max(canvas.size), 2 * min(canvas.size))  # long strips are viewed in parts
    font = _font(max(LEAST_FONT_SIZE, round(side / FONT_SHARE)))
    line = max(2, round(side / LINE_SHARE))
    boxes = [_within(box, scale, canvas.size) for _, _, box in found]
    colours = [PALETTE[label % len(PALETTE)] for _, label, _ in found]
    for box, colour in zip(boxes, colours, strict=True):
        # A dark line below keeps a box visible where the image has its colour.
        draw.rectangle(box, outline="black", width=line + max(1, line // 2))
        draw.rectangle(box, outline=colour, width=line)
    least_room = min(canvas.width, max(LABEL_SHARE * canvas.width, LABEL_LETTERS * font.size))
    rooms = [max(right - left, least_room) for left, _, right, _ in boxes]
    texts = [_shortened(text, font, room) for (text, _, _), room in zip(found, rooms, strict=True)]
    places = _place_labels(boxes[::-1], texts[::-1], font, canvas.size)[::-1]
    for place, text, colour in zip(places, texts, colours, strict=True):
        draw.rectangle(place, fill=colour)
        draw.text(place[:2], f" {text}", fill=_readable_on(colour), font=font)
    return canvas


def _chosen(
    result: Mapping[str, Tensor], names: Mapping[int, str], threshold: float
) -> list[tuple[str, int, list[float]]]:
    """Return text, category id and box of the detections to draw, highest scores last."""
    labels, boxes = result["labels"].tolist(), result["boxes"].tolist()
    titles = [one_line(str(names.get(label, label))) for label in labels]  # Pillow's layout fails on line ends
    if "scores" not in result:
        return list(zip(titles, labels, boxes, strict=True))
    found = sorted(zip(result["scores"].tolist(), titles, labels, boxes, strict=True))
    return [(f"{title} {score:.2f}", label, box) for score, title, label, box in found if score >= threshold]


def scale_to_read(width: int, height: int) -> int:
    """Return the integer factor to enlarge a picture of that many pixels by, to make labels readable."""
    short, long = sorted((width, height))
    wanted = max(round(LEAST_LONG_SIDE / long), round(LEAST_SHORT_SIDE / short))
    return max(1, min(wanted, MOST_LONG_SIDE // long))


def write_picture(path: str | Path, picture: Image.Image) -> None:
    """Write a PNG or JPEG, by suffix, atomically."""
    write_atomic(path, lambda stream: picture.save(stream, **FORMATS[Path(path).suffix]))


def write_grid(path: str | Path, columns: Sequence[tuple[str, Sequence[Image.Image]]]) -> None:
    """Write `grid` as a PNG or JPEG, by suffix."""
    write_picture(path, grid(columns))


def grid(columns: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Return captioned columns of pictures, side by side; some may be shorter or empty.

    A caption may have several lines; its letters scale with the columns, as far as they fit.
    """
    widths = [max((picture.width for picture in pictures), default=0) for _, pictures in columns]
    heights = [
        max(picture.height for picture in row if picture is not None)
        for row in zip_longest(*(pictures for _, pictures in columns))
    ]
    font = _caption_font([caption for caption, _ in columns], widths)
    lines = max(len(caption.splitlines()) for caption, _ in columns)
    spacing = round(1.35 * font.size)
    top_of_pictures = GAP + lines * spacing
    width, height = sum(widths) + GAP * (len(widths) + 1), top_of_pictures + sum(heights) + GAP * len(heights)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = GAP
    for (caption, pictures), column_width in zip(columns, widths, strict=True):
        for number, text in enumerate(caption.splitlines()):
            fitting = _shortened(text, font, column_width)
            draw.text((left, GAP // 2 + number * spacing), fitting, fill="black", font=font)
        top = top_of_pictures
        for picture, row_height in zip(pictures, heights, strict=False):
            sheet.paste(picture, (left, top))
            top += row_height + GAP
        left += column_width + GAP
    return sheet


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load Matplotlib's DejaVu Sans: Pillow's own font only has ASCII and few accents."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _caption_font(captions: Sequence[str], widths: Sequence[int]) -> ImageFont.FreeTypeFont:
    """Return the largest font, within limits, in which every line of each caption fits its column."""
    largest = max(CAPTION_FONT_SIZE, round(max(widths, default=0) / FONT_SHARE))
    for size in range(largest, LEAST_FONT_SIZE, -1):
        font = _font(size)
        if all(font.getlength(t) <= w for c, w in zip(captions, widths, strict=True) for t in c.splitlines() if w):
            return font
    return _font(LEAST_FONT_SIZE)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten `text` in the middle to fit `width` pixels: its ends matter most."""
    kept = len(text)
    short = text
    while kept > 1 and font.getlength(f" {short} ") > width:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return short


def _within(box: Sequence[float], scale: int, size: tuple[int, int]) -> Rectangle:
    """Scale an image's box to a picture `scale` times as large, and clip it to the picture."""
    limits = (size[0] - 1, size[1] - 1) * 2
    left, top, right, bottom = (min(max(value * scale, 0), limit) for value, limit in zip(box, limits, strict=True))
    return left, top, max(left, right), max(top, bottom)


def _place_labels(
    boxes: Sequence[Rectangle], texts: Sequence[str], font: ImageFont.FreeTypeFont, size: tuple[int, int]
) -> list[Rectangle]:
    """Place each box's label above, below, or inside along its edges; earlier boxes choose first."""
    ascent, descent = font.getmetrics()
    height = ascent + descent
    placed: list[Rectangle] = []
    for (left, top, right, bottom), text in zip(boxes, texts, strict=True):
        width = font.getlength(f" {text} ")
        corners = [(left, top - height), (left, bottom), (left, top), (left, bottom - height)]
        corners += [(right - width, y) for _, y in corners]
        # After moving into the picture, two may be equal.
        inside = [(min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)) for x, y in corners]
        choices = [(x, y, x + width, y + height) for x, y in inside]
        placed.append(min(choices, key=lambda choice: sum(_common_area(choice, other) for other in placed)))
    return placed


def _common_area(one: Rectangle, other: Rectangle) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _readable_on(colour: str) -> str:
    """Return black for light colours, white for dark ones, by sRGB relative luminance (ITU-R BT.709 weights)."""
    red, green, blue = ((value / 255) ** 2.2 for value in ImageColor.getrgb(colour))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    # WCAG's contrast with the colour: 1.05 / (L + 0.05) for white, (L + 0.05) / 0.05 for black.
    return "white" if luminance + 0.05 < (1.05 * 0.05) ** 0.5 else "black"
