"""Damaged `--cfgs`, annotations, journals and pictures are read, or refused in one sentence: nothing else ever."""

import io
import json
import os
import struct
import zlib
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.annotations import category_names
from datasets.coco import CocoDataset, annotation_path, image_folder
from datasets.decode import read_upright
from datasets.transforms import eval_transforms
from models.widths import LARGEST_FILE, Widths
from pruning.journal import Decision, Journal, Trial, read_events
from tests.trust.mutations import FUZZ, VALUES, damaged_bytes, damaged_value, deep
from util.errors import UserError

FULL = Widths.dense(1, 2, 32, 32)
NESTED = [[[16, 20]], [[8, 32, 16], [32, 4, 32]]]
LONGEST = 600  # characters of a sentence, beside paths


def value_or_sentence(read):
    """What `read()` gives, None where it raises a `UserError` of one line; any other exception goes through."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < LONGEST
        return None


@FUZZ
@given(st.one_of(damaged_value(NESTED), VALUES))
def test_widths_from_values(value):
    text = json.dumps(value)
    for given_widths in (text, text.split(" ")):
        widths = value_or_sentence(lambda given_widths=given_widths: Widths.parse(given_widths))
        if widths is not None:
            value_or_sentence(lambda widths=widths: widths.check(nheads=4, full=FULL))
            assert Widths.parse(str(widths)) == widths


@FUZZ
@given(st.one_of(damaged_bytes(json.dumps(NESTED).encode()), st.binary(max_size=50)))
def test_widths_from_files_and_from_what_no_encoding_knows(tmp_path, content):
    (tmp_path / "widths").write_bytes(content)
    value_or_sentence(lambda: Widths.parse(str(tmp_path / "widths")))
    value_or_sentence(lambda: Widths.parse([content.decode("utf-8", "surrogateescape")]))


@pytest.mark.parametrize("text", ["", " ", "[", "[" * 100_000, "[1" + "0" * 5000 + "]", "\0", "/", ".", "/dev/zero"])
def test_hard_widths(text):
    assert value_or_sentence(lambda: Widths.parse(text)) is None


def test_a_file_of_widths_is_read_no_further_than_it_can_be_long(tmp_path):
    (tmp_path / "long").write_bytes(json.dumps(NESTED).encode() + b" " * (LARGEST_FILE + 1))
    assert value_or_sentence(lambda: Widths.parse(str(tmp_path / "long"))) is None
    (tmp_path / "long").write_bytes(json.dumps(NESTED).encode() + b" " * 1000)
    assert Widths.parse(str(tmp_path / "long")).to_list() == NESTED


@pytest.fixture(scope="module")
def set_folder(tmp_path_factory):
    """A data set of one picture of 40 x 60 pixels with two boxes."""
    root = tmp_path_factory.mktemp("set")
    image_folder(root, "val2017").mkdir()
    annotation_path(root, "val2017").parent.mkdir()
    Image.new("RGB", (60, 40)).save(image_folder(root, "val2017") / "a.jpg")
    return root


ANNOTATIONS = {
    "images": [{"id": 2, "file_name": "a.jpg", "width": 60, "height": 40}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 2, "category_id": 7, "bbox": [6, 4, 12, 8], "area": 96.0, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 3, "bbox": [0.5, 0, 60, 40.25], "area": 5, "iscrowd": 1},
    ],
}


def read_set(root, content):
    """Everything that reads an annotation file, on one that holds `content`."""
    path = annotation_path(root, "val2017")
    path.write_bytes(content)
    os.utime(path, ns=(0, zlib.crc32(content) * 1000))  # the annotations are remembered by the file's time
    dataset = value_or_sentence(
        lambda: CocoDataset(image_folder(root, "val2017"), path, eval_transforms(32), min_side=0.0)
    )
    value_or_sentence(lambda: category_names(path))
    if dataset is None:
        return None
    targets = [value_or_sentence(lambda index=index: dataset[index][1]) for index in range(len(dataset))]
    for target in targets:
        assert target is None or (target["boxes"].isfinite().all() and (target["labels"] >= 0).all())
    return targets


@FUZZ
@given(damaged_value(ANNOTATIONS))
def test_annotations_of_other_values(set_folder, content):
    read_set(set_folder, json.dumps(content).encode())


@FUZZ
@given(damaged_bytes(json.dumps(ANNOTATIONS).encode()))
def test_annotations_of_damaged_bytes(set_folder, content):
    read_set(set_folder, content)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe" + json.dumps(ANNOTATIONS).encode("utf-16-le")[:-1],
        json.dumps(deep(900)).encode(),
        b'{"a":' * 50_000,
        json.dumps(ANNOTATIONS).replace("96.0", "1e999").encode(),
        json.dumps(ANNOTATIONS).replace("96.0", "9" * 5000).encode(),
        json.dumps(ANNOTATIONS).replace("96.0", "-Infinity").encode(),
        json.dumps(ANNOTATIONS).replace('"a.jpg"', '"\\u0000"').encode(),
        json.dumps(ANNOTATIONS).replace('"a.jpg"', '"\\ud800"').encode(),
        json.dumps(ANNOTATIONS).replace('"a.jpg"', '"."').encode(),
        json.dumps(ANNOTATIONS).replace('"a.jpg"', json.dumps("a" * 5000)).encode(),
    ],
)
def test_hard_annotations(set_folder, content):
    assert read_set(set_folder, content) is None or content.count(b'"."')


def test_the_last_of_repeated_keys_counts(set_folder):
    content = json.dumps(ANNOTATIONS).replace('"area": 96.0', '"area": "x", "area": 96.0').encode()
    assert read_set(set_folder, content)[0]["area"].tolist() == [96.0]


FACTS = {"schedule": {"name": "mgp"}, "base_ap": 0.5, "args": {"batch_size": 2}}
KEPT = {"query": [0, 5], "value": [1, 4]}
DECISION = {
    "visit": 0, "module": "encoder.0.attention", "full_width": 8, "step": 0, "width": 2, "kept": KEPT,
    "target_ap": 0.5, "subset_ap": 0.4, "full_ap": None, "accepted": False, "transformer_params": 1000,
    "image_passes": 7, "whole_passes": 1.25, "seconds": 3.0,
}  # fmt: skip
TRIAL = asdict(Trial(0.5, 1.0, {"encoder.0.ffn": 8}, 0.25, 0.5))
LINES = [{"event": "start", **FACTS}, {"event": "decision", **DECISION}, {"event": "trial", **TRIAL}]


def read_journal(path, content):
    """Everything that reads a journal."""
    path.write_bytes(content)
    found = value_or_sentence(lambda: Journal(path).resume(FACTS))
    if found is None:
        assert path.read_bytes() == content  # refused, so it is left as it is
        return
    base_ap, lines = found
    assert abs(base_ap - FACTS["base_ap"]) < 0.01
    for decision in value_or_sentence(lambda: read_events(lines, "decision", Decision, path)) or ():
        assert all(type(getattr(decision, name)) is int for name in ("visit", "step", "width", "image_passes"))
        assert all(indices.dtype == torch.int64 and indices.dim() == 1 for indices in decision.kept.values())
        assert decision.full_ap is None or abs(decision.full_ap) < 2**53
        assert not decision.accepted or decision.full_ap is not None
        assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))).to_dict() == decision.to_dict()
    for trial in value_or_sentence(lambda: read_events(lines, "trial", Trial, path)) or ():
        assert isinstance(trial.full_ap, float) and all(type(width) is int for width in trial.widths.values())


@FUZZ
@given(damaged_value(LINES))
def test_journals_of_other_values(tmp_path, lines):
    read_journal(tmp_path / "search.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


@FUZZ
@given(damaged_bytes("".join(json.dumps(line) + "\n" for line in LINES).encode()))
def test_journals_of_damaged_bytes(tmp_path, content):
    read_journal(tmp_path / "search.jsonl", content)


@pytest.mark.parametrize("name", [*DECISION, *TRIAL])
def test_every_field_of_a_journal_is_checked(name):
    """A value of another type, or a number that none of them can be, is refused."""
    event, values = ("decision", DECISION) if name in DECISION else ("trial", TRIAL)
    for wrong in ([None], float("nan"), 10**30):
        line = {"event": event, **values, name: wrong}
        with pytest.raises(UserError, match=f"found a damaged {event}"):
            read_events([line], event, Decision if event == "decision" else Trial, "a.jsonl")


def test_hard_journals(tmp_path):
    start, decision = (json.dumps(line).encode() + b"\n" for line in LINES[:2])
    end = b'{"event": "end"}\n'
    for lines in ([b"[" * 100_000 + b"\n"], [end, decision], [start], [decision, start]):
        content = start + b"".join(lines)
        (tmp_path / "search.jsonl").write_bytes(content)
        with pytest.raises(UserError):
            Journal(tmp_path / "search.jsonl").resume(FACTS)
        assert (tmp_path / "search.jsonl").read_bytes() == content
    accepted = {"event": "decision", **DECISION, "accepted": True}
    with pytest.raises(UserError, match="accepted without full_ap"):
        read_events([accepted], "decision", Decision, "a.jsonl")


def picture(format, mode="RGB"):
    """The bytes of a small picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format=format)
    return stream.getvalue()


PICTURES = [
    picture(*kind)
    for kind in (("JPEG",), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG",), ("PNG", "P"), ("PNG", "1"), ("GIF", "P"),
                 ("BMP",), ("TIFF", "CMYK"), ("WEBP",))
]  # fmt: skip


@FUZZ
@given(st.sampled_from(PICTURES).flatmap(damaged_bytes))
def test_damaged_pictures(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    image = value_or_sentence(lambda: read_upright(tmp_path / "a.jpg").pixels)
    if image is not None:
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.numel() < 10**9


@pytest.mark.parametrize(
    "content", [b"", b"a picture, in words", b"\xff\xd8", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"P6 1 1 255\n"]
)
def test_files_that_are_no_pictures(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    assert value_or_sentence(lambda: read_upright(tmp_path / "a.jpg")) is None


def test_a_picture_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path):
    """60,000 x 60,000 pixels of a PNG of a few kilobytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1_000_000))), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(UserError, match=r"bomb\.png cannot be read as an image: .*pixels"):
        read_upright(tmp_path / "bomb.png")


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    Image.open(io.BytesIO(content))  # Pillow itself would read it
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_upright(tmp_path / "a.jpg")


def test_sixteen_bits_of_grey_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert torch.equal(read_upright(tmp_path / name).pixels[1].flatten(), torch.arange(256, dtype=torch.uint8)), (
            name
        )
