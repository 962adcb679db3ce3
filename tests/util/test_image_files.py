"""Images named on a command line: which there are, how they are read, and how their pictures and ids are called."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from util.errors import UserError
from util.image_files import find_images, image_ids_of, picture_names, read_upright


@pytest.fixture
def colours() -> Image.Image:
    """A picture of 12 x 8 pixels in four colours, a different one in each corner."""
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:4, :6], pixels[:4, 6:], pixels[4:, :6], pixels[4:, 6:] = (200, 0, 0), (0, 100, 0), (0, 0, 250), (90, 90, 90)
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_every_mode_is_read_as_people_see_it(colours, tmp_path):
    expected = as_tensor(colours)
    colours.quantize(4).save(tmp_path / "palette.png")
    colours.convert("RGBA").save(tmp_path / "opaque.png")
    colours.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", colours.size)])
    for name in ("palette.png", "opaque.png", "moving.gif"):
        assert (read_upright(tmp_path / name).int() - expected.int()).abs().max() <= 1, name
    grey = colours.convert("L")
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    grey.convert("1").convert("L").convert("1").save(tmp_path / "bits.png")
    for name in ("grey.png", "deep.png"):
        assert torch.equal(read_upright(tmp_path / name), as_tensor(grey.convert("RGB"))), name
    assert set(read_upright(tmp_path / "bits.png").unique().tolist()) <= {0, 255}


def test_what_is_transparent_is_white(colours, tmp_path):
    alpha = Image.new("L", colours.size, 255)
    alpha.paste(0, (0, 0, 6, 4))
    colours.putalpha(alpha)
    colours.save(tmp_path / "a.png")
    found = read_upright(tmp_path / "a.png")
    assert (found[:, :4, :6] == 255).all() and found[:, 0, 11].tolist() == [0, 100, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright_whatever_their_exif_orientation(colours, tmp_path, orientation):
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = colours.transpose(turned[orientation]) if orientation > 1 else colours
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_upright(tmp_path / "a.png"), as_tensor(colours))


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif cannot be read as an image: found pixels in floating point"):
        read_upright(tmp_path / "a.tif")


def test_images_are_found_once_and_in_order(colours, tmp_path):
    for name in ("b.png", "a.JPG", "below/c.png", "below/deep/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")

    def found(*words: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_images([f"{tmp_path}/{word}" for word in words])]

    assert found("") == ["a.JPG", "b.png"]
    assert found("b.png", "", "below/../b.png") == ["b.png", "a.JPG"]
    assert found("**") == ["a.JPG", "b.png", "below/c.png", "below/deep/d.png"]
    assert found("below/*", "notes.txt") == ["below/c.png", "notes.txt"]
    (tmp_path / "x[1].png").write_bytes(b"")
    assert found("x[1].png") == ["x[1].png"]


def test_pictures_have_names_of_their_own(tmp_path):
    paths = [tmp_path / name for name in ("a/1.jpg", "b/1.jpg", "1-2.jpg", "A.png", "a.png", "1.png")]
    names = picture_names(paths, ".jpg")
    assert names == ["1.jpg", "1-2.jpg", "1-2-2.jpg", "A.jpg", "a-2.jpg", "1-3.jpg"]
    assert len({name.lower() for name in names}) == len(paths)


def test_ids_come_from_annotations_that_tell_each_image_apart(tmp_path):
    def ids(*names: str):
        return image_ids_of([tmp_path / name for name in names], tmp_path / "a.json")

    images = [{"id": 5, "file_name": "1.jpg"}, {"id": 6, "file_name": "b/1.jpg"}, {"id": 7, "file_name": "2.jpg"},
              {"id": 8, "file_name": "2.jpg"}]  # fmt: skip
    tables = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "one"}]}
    (tmp_path / "a.json").write_text(json.dumps(tables))
    assert ids("a/1.jpg", "b/1.jpg") == [5, 6]
    assert ids("a/1.jpg", "c/1.jpg") is None and ids("2.jpg") is None and ids("1.jpg", "3.jpg") is None
