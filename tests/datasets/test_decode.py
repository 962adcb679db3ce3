"""The decoder: every mode becomes 8-bit RGB; photos are turned upright if the listed size requires it."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from datasets.decode import image_suffixes, read_listed, read_size, read_upright
from util.errors import UserError

ORIENTATION = 0x0112
# EXIF orientation -> the transform that was applied to the stored picture.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
WIDE, TALL = (12, 8), (8, 12)


@pytest.fixture
def colours() -> Image.Image:
    """A picture of 12 x 8 pixels in four colours, a different one in each corner."""
    return corners(*WIDE)


def corners(width: int, height: int) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    rows, columns = slice(height // 2), slice(width // 2)
    pixels[:] = (90, 90, 90)
    pixels[rows], pixels[:, columns], pixels[rows, columns] = (0, 100, 0), (0, 0, 250), (200, 0, 0)
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def exif(orientation: object) -> bytes:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block.tobytes()


def pixels(path):
    return read_upright(path).pixels


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [WIDE, TALL, (8, 8)])
def test_the_listed_size_decides_how_a_photo_is_turned(tmp_path, suffix, orientation, shape):
    upright = corners(*shape)
    stored = upright.transpose(STORED[orientation]) if orientation > 1 else upright
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif(orientation), **({"lossless": True} if suffix == "webp" else {}))
    swaps = orientation >= 5 and shape[0] != shape[1]
    found = read_upright(path)
    assert torch.equal(found.pixels, as_tensor(upright)) and found.is_upright
    for listed, is_upright in ((stored.size, False), (stored.size[::-1], swaps), (None, False), ((5, 7), False)):
        found = read_listed(path, listed)
        wanted = upright if is_upright else stored
        assert torch.equal(found.pixels, as_tensor(wanted)), listed
        assert (found.orientation, found.is_upright) == (orientation, is_upright)
        assert read_size(path, listed) == wanted.size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"\0" * 30])
def test_a_damaged_exif_block_leaves_the_pixels_as_they_are(colours, tmp_path, block):
    colours.save(tmp_path / "a.png", exif=block)
    for found in (read_upright(tmp_path / "a.png"), read_listed(tmp_path / "a.png", TALL)):
        assert torch.equal(found.pixels, as_tensor(colours)) and found.orientation == 1


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_unknown_orientation_is_ignored(colours, tmp_path, orientation):
    colours.save(tmp_path / "a.jpg", exif=exif(orientation), quality=100)
    for found in (read_upright(tmp_path / "a.jpg"), read_listed(tmp_path / "a.jpg", TALL)):
        assert found.orientation == 1 and found.pixels.shape == (3, 8, 12)


def test_every_mode_keeps_its_colours(colours, tmp_path):
    expected = as_tensor(colours)
    colours.quantize(4).save(tmp_path / "palette.png")
    colours.convert("RGBA").save(tmp_path / "opaque.png")
    colours.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", colours.size)])
    colours.convert("CMYK").save(tmp_path / "inks.tif")
    colours.save(tmp_path / "bitmap.bmp")
    for name in ("palette.png", "opaque.png", "moving.gif", "inks.tif", "bitmap.bmp"):
        assert (pixels(tmp_path / name).int() - expected.int()).abs().max() <= 1, name
    grey = colours.convert("L")
    grey.save(tmp_path / "grey.png")
    grey.convert("LA").save(tmp_path / "opaque-grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("grey.png", "opaque-grey.png", "deep.png"):
        assert torch.equal(pixels(tmp_path / name), as_tensor(grey.convert("RGB"))), name
    bits = Image.fromarray(np.asarray(grey) > 50)
    bits.save(tmp_path / "bits.png")
    assert torch.equal(pixels(tmp_path / "bits.png"), as_tensor(bits.convert("RGB")))
    assert set(pixels(tmp_path / "bits.png").unique().tolist()) == {0, 255}


RAMP = np.linspace(0, 255, 256).reshape(16, 16)  # the expected colours
SIGNED = np.array([[-(2**31)], [2**31 - 1]])
DEEP = {
    "16 bits": (RAMP * 257).astype(np.uint16),
    "dark 16 bits": np.append(RAMP[:1], [[65535] * 16], 0).astype(np.uint16),
    "16 bits in 32": (RAMP * 257).astype(np.int32),
    "8 bits in 32": RAMP.astype(np.int32),
    "32 bits": (RAMP * 8_000_000 - 10**9).astype(np.int32),
    "floats to 1": (RAMP / 255).astype(np.float32),
    "floats": (RAMP * 1e30 - 3e31).astype(np.float32),
    "dark floats": (RAMP / 2550).astype(np.float32),
    "one level": np.full((4, 4), 7.5, np.float32),
}
MADE_OF = {
    "dark 16 bits": np.append((RAMP[:1] / 257).round(), [[255] * 16], 0),
    "dark floats": (RAMP / 10).round(),
    "one level": np.zeros((4, 4)),
}


@pytest.mark.parametrize("name", DEEP)
def test_16_bit_greys_and_floats_are_scaled_to_8_bits_by_their_range(tmp_path, name):
    Image.fromarray(DEEP[name]).save(tmp_path / "a.tif")
    found = pixels(tmp_path / "a.tif")
    wanted = torch.from_numpy(MADE_OF.get(name, RAMP)).expand(3, -1, -1)
    assert (found.double() - wanted).abs().max() <= (1 if name.startswith("dark floats") else 0)
    if DEEP[name].dtype == np.uint16:
        Image.fromarray(DEEP[name]).save(tmp_path / "a.png")
        assert torch.equal(pixels(tmp_path / "a.png"), found)


def test_a_dark_16_bit_pgm_is_scaled_by_the_range_of_16_bits(tmp_path):
    for level in (0, 257, 65535):
        (tmp_path / "a.pgm").write_bytes(b"P5\n2 1\n65535\n" + np.array([0, level], ">u2").tobytes())
        assert pixels(tmp_path / "a.pgm")[0].tolist() == [[0, round(level / 257)]]


def test_unsigned_32_bits_do_not_wrap(tmp_path):
    levels = (RAMP / 255 * (2**32 - 1)).astype(np.uint32)
    image = Image.frombytes("I", (16, 16), levels.tobytes())
    image.save(tmp_path / "signed.tif")
    content = (tmp_path / "signed.tif").read_bytes()
    entry = np.array([339, 3], "<u2").tobytes() + np.array([1, 2], "<u4").tobytes()  # SampleFormat: signed
    assert content.count(entry) == 1
    (tmp_path / "a.tif").write_bytes(content.replace(entry, entry[:8] + np.array([1], "<u4").tobytes()))
    assert torch.equal(pixels(tmp_path / "a.tif")[0].double(), torch.from_numpy(RAMP))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_refused(tmp_path, wrong):
    Image.fromarray(np.array([[0.5, wrong, wrong]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif cannot be read as an image: found 2 NaN or infinite pixels"):
        read_upright(tmp_path / "a.tif")


def test_transparent_pixels_become_white(colours, tmp_path):
    alpha = Image.new("L", colours.size, 255)
    alpha.paste(0, (0, 0, 6, 4))  # the red corner
    whitened = colours.copy()
    whitened.paste("white", (0, 0, 6, 4))
    red = colours.getpixel((0, 0))
    colours.quantize(4).save(tmp_path / "palette.gif", transparency=colours.quantize(4).getpixel((0, 0)))
    colours.quantize(4).save(tmp_path / "palette.png", transparency=colours.quantize(4).getpixel((0, 0)))
    colours.save(tmp_path / "colour.png", transparency=red)
    colours.putalpha(alpha)
    colours.save(tmp_path / "alpha.png")
    colours.save(tmp_path / "alpha.webp", lossless=True)
    colours.save(tmp_path / "alpha.tif")
    for path in sorted(tmp_path.iterdir()):
        assert (pixels(path).int() - as_tensor(whitened).int()).abs().max() <= 1, path.name
    grey = colours.convert("LA")
    grey.save(tmp_path / "grey.png")
    deep = np.full((4, 4), 5140, np.uint16)
    deep[0] = 1000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    content, chunk = (tmp_path / "deep.png").read_bytes(), b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "deep.png").write_bytes(content[:33] + chunk + content[33:])  # after the header
    assert pixels(tmp_path / "grey.png")[:, 0, 0].tolist() == [255] * 3
    assert pixels(tmp_path / "deep.png")[0].tolist() == [[255] * 4] + [[20] * 4] * 3


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 100, 51)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[:, 0, 0].tolist() == [255, 204, 224]


def test_a_file_that_is_no_image_is_a_one_line_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.jpg cannot be read as an image: found no known format"):
        read_listed(tmp_path / "a.jpg", (3, 4))
    assert read_size(tmp_path / "a.jpg", (3, 4)) is None and read_size(tmp_path / "b.jpg", None) is None


def test_suffixes_are_those_of_the_formats_read(colours, tmp_path):
    assert {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".jp2"} <= set(
        image_suffixes()
    )
    assert not {".eps", ".pdf", ".txt", ".heic"} & set(image_suffixes())
    assert (".avif" in image_suffixes()) == ("avif" in features.get_supported_modules())
    if ".avif" in image_suffixes():
        colours.save(tmp_path / "a.avif", quality=100)
        found, wanted = pixels(tmp_path / "a.avif").int(), as_tensor(colours).int()
        assert (found - wanted)[:, [0, 0, -1, -1], [0, -1, 0, -1]].abs().max() <= 3  # colours blend between them
    stream = io.BytesIO()
    colours.save(stream, "JPEG", quality=100)
    (tmp_path / "a.jfif").write_bytes(stream.getvalue())
    assert pixels(tmp_path / "a.jfif").shape == (3, 8, 12)
