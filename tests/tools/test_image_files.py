"""Images named on a command line: which there are, how they are read, and how their pictures and ids are called."""

import json

import pytest
from PIL import Image

from datasets.transforms import eval_transforms
from tools.image_files import (
    ImageFiles,
    ListedImage,
    ReadingNotes,
    count_suffixes,
    find_images,
    listed_images,
    picture_names,
)
from util.errors import UserError


def test_images_are_found_once_and_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "below/c.png", "below/deep/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")

    def found(*words: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_images([f"{tmp_path}/{word}" for word in words])[0]]

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


def test_what_is_left_out_of_folders_and_globs_is_counted(tmp_path):
    for name in ("a.jpg", "b.JFIF", ".c.png", "d.heic", "e.HEIC", "notes", "f.txt", ".DS_Store", "below/g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    words = [str(tmp_path / word) for word in ("", "f.txt", "a*")]
    images, left_out = find_images(words)
    assert [path.name for path in images] == [".c.png", "a.jpg", "b.JFIF", "f.txt"]
    assert count_suffixes(left_out) == "3 files (.heic: 2, no suffix: 1)"
    with pytest.raises(UserError, match=r"below: found no images in the folder but 1 file \(\.txt: 1\), expected some"):
        find_images([str(tmp_path / "below")])


@pytest.fixture
def listing(tmp_path):
    """The images of an annotation file without annotations, matched with the files in its folder."""

    def listed(images: list[dict], *names: str) -> list[ListedImage | None]:
        tables = {"images": images, "categories": [{"id": 1, "name": "one"}]}
        (tmp_path / "a.json").write_text(json.dumps(tables))
        return listed_images([tmp_path / name for name in names], tmp_path / "a.json")

    return listed


def test_listed_images_are_matched_only_to_unambiguous_files(listing):
    images = [{"id": 5, "file_name": "1.jpg", "width": 30, "height": 20},
              {"id": 6, "file_name": "b/1.jpg", "width": 30},
              {"id": 7, "file_name": "2.jpg"}, {"id": 8, "file_name": "2.jpg"}]  # fmt: skip
    assert listing(images, "a/1.jpg", "b/1.jpg") == [ListedImage(5, (30, 20)), ListedImage(6, None)]
    assert listing(images, "a/1.jpg", "c/1.jpg", "b/1.jpg") == [None, None, ListedImage(6, None)]
    assert listing(images, "2.jpg") == [None]
    assert listing(images, "1.jpg", "3.jpg") == [ListedImage(5, (30, 20)), None]


def test_names_in_another_unicode_normal_form_are_the_same(listing):
    composed, decomposed = "caf\u00e9.jpg", "cafe\u0301.jpg"
    assert listing([{"id": 5, "file_name": composed}], decomposed) == [ListedImage(5, None)]
    both = [{"id": 5, "file_name": composed}, {"id": 6, "file_name": decomposed}]
    assert listing(both, decomposed) == [None]


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("shape", [(12, 8), (8, 8)])
def test_unlisted_images_are_read_upright_and_listed_ones_by_their_size(tmp_path, orientation, shape):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", shape).save(tmp_path / "a.png", exif=exif)
    upright = shape[::-1] if orientation == 6 else shape
    notes = {}
    for title, size_wh in (("unlisted", None), ("stored", shape), ("upright", upright), ("other", (99, 99))):
        listed = [None if title == "unlisted" else ListedImage(1, size_wh)]
        sample = ImageFiles([tmp_path / "a.png"], eval_transforms(8), listed)[0]
        height, width = sample.picture.shape[1:]
        assert (width, height) == {"unlisted": upright, "upright": upright}.get(title, shape)
        notes[title] = ReadingNotes()
        notes[title].add(tmp_path / "a.png", sample, listed[0])
    assert notes["other"].other_sizes == {str(tmp_path / "a.png"): (shape, (99, 99))}
    assert not any(notes[title].other_sizes for title in ("unlisted", "stored", "upright"))
    assert [title for title in notes if notes[title].turns()] == (["unlisted"] if orientation > 1 else [])
    if orientation > 1:
        is_hidden = orientation == 3 or shape == (8, 8)
        assert ("same width and height as before: 1," in notes["unlisted"].turns()) == is_hidden
