"""Pictures of detections: all of a label inside the picture, and readable on any background."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tools.draw import (
    PALETTE,
    _font,
    _place_labels,
    _readable_on,
    _shortened,
    draw_detections,
    scale_to_read,
    write_grid,
)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [value / 255 for value in ImageColor.getrgb(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("colour", PALETTE)
def test_text_stands_out_from_its_label(colour):
    light, dark = sorted((luminance(colour), luminance(_readable_on(colour))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("label", range(len(PALETTE)))
def test_a_box_shows_on_an_image_of_its_own_colour(label):
    plain = torch.tensor(ImageColor.getrgb(PALETTE[label]), dtype=torch.uint8)[:, None, None].expand(3, 90, 120)
    result = {"scores": torch.tensor([0.9]), "labels": torch.tensor([label]),
              "boxes": torch.tensor([[10.0, 60.0, 50.0, 80.0]])}  # fmt: skip
    drawn = np.array(draw_detections(plain, result, {}))
    changed = (drawn != np.array(draw_detections(plain, result, {}, threshold=0.95))).any(axis=2)
    assert changed[70, 10:15].any() and changed[70, 46:51].any() and not changed[:40].any() and not changed[70, 25]


def test_labels_stay_inside_and_off_each_other_where_there_is_room():
    font, size = _font(12), (300, 200)
    boxes = [(0, 0, 299, 199), (250, 0, 299, 20), (0, 180, 30, 199), (100, 100, 140, 140), (100, 101, 140, 141)]
    texts = ["whole picture 0.99", "corner 0.90", "corner 0.80", "twin 0.70", "twin 0.60"]
    places = _place_labels(boxes, texts, font, size)
    for left, top, right, bottom in places:
        assert left >= 0 and top >= 0 and right <= size[0] + 1e-6 and bottom <= size[1]
    for number, one in enumerate(places):
        for other in places[:number]:
            assert min(one[2], other[2]) <= max(one[0], other[0]) or min(one[3], other[3]) <= max(one[1], other[1])


def test_long_names_leave_room_for_their_score_and_all_letters_are_there():
    font = _font(12)
    short = _shortened("a category with a very long name indeed 0.87", font, 120)
    assert short.startswith("a cat") and short.endswith("0.87") and "…" in short and font.getlength(short) <= 120
    # A font without a letter shows the same box in its place.
    shown = {font.getmask(letter).getbbox() and bytes(font.getmask(letter)) for letter in "åñßλЖ…"}
    assert len(shown) == 6


@pytest.mark.parametrize(
    "end", ["\n", "\r", "\r\n", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\0", "\x1b", "\ud800"]
)
def test_names_with_line_ends_and_control_characters_are_drawn_on_one_line(end):
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    result = {"labels": torch.tensor([0]), "boxes": torch.tensor([[20.0, 50.0, 80.0, 90.0]])}
    drawn, plain = (np.array(draw_detections(image, result, {0: name})) for name in (f"ring{end}", "ring"))
    if end.isspace():
        assert np.array_equal(drawn, plain)
    assert drawn[60:].any()
    draw_detections(image, result, {0: f"{end}a{end}b"})


def test_better_scores_are_drawn_on_top_and_boxes_off_the_image_are_drawn_too():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 50.0, 80.0, 90.0], [20.0, 50.0, 80.0, 90.0], [-50.0, -50.0, 300.0, -20.0]])
    result = {"scores": torch.tensor([0.9, 0.5, 0.4]), "labels": torch.tensor([0, 1, 2]), "boxes": boxes}
    found = np.array(draw_detections(image, result, {}, threshold=0.3))
    assert tuple(found[70, 20]) == ImageColor.getrgb(PALETTE[0])
    without_scores = {key: result[key] for key in ("labels", "boxes")}
    assert np.array(draw_detections(image, without_scores, {})).any()


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    sizes = ((64, 48), (320, 200), (640, 480), (4000, 3000), (60, 600), (4, 1000))
    assert [scale_to_read(*size) for size in sizes] == [10, 2, 1, 1, 3, 2]


@pytest.mark.parametrize("name", ["grid.png", "grid.jpg"])
def test_a_grid_has_room_for_captions_of_several_lines(tmp_path, name):
    pictures = [Image.new("RGB", (200, 100), "red")]
    write_grid(tmp_path / name, [("one line", pictures), ("two\nlines", pictures)])
    grid = Image.open(tmp_path / name)
    pixels = np.array(grid.convert("RGB")).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 60)
    top = int(np.flatnonzero(red.any(axis=1))[0])
    assert red.sum() == pytest.approx(2 * 200 * 100, rel=0.02) and top >= 2 * 14
    dark = (pixels.sum(axis=2) < 200)[:top]
    assert dark.any() and np.flatnonzero(dark.any(axis=1))[-1] < top - 1
