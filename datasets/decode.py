"""The one decoder of image files: for training, evaluation, searches, inference, pictures, reports and the data check.

Every mode becomes 8-bit RGB, and a photo that lies on its side is turned by one rule, see `read_listed`.
"""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, features
from torch import Tensor
from torchvision.transforms.v2 import functional

from util.errors import UserError, reason_of

# Formats of pictures alone: for others Pillow starts programs (EPS) or reads what the file points to.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
if "avif" in features.get_supported_modules():  # since Pillow 11.3
    FORMATS += ("AVIF",)
SIXTEEN_BITS = (0, 65535)
# From the pixels as stored to the picture as people see it, by EXIF orientation; 1 is upright.
UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING = (5, 6, 7, 8)  # orientations that exchange width and height
HALF_TURNS = (2, 3, 4)  # and those that do not


@dataclass(frozen=True)
class DecodedImage:
    """An image file in memory.

    Attributes:
        pixels: RGB, uint8 3 x H x W.
        orientation: its EXIF orientation, 1 (upright, or not given) to 8.
        is_upright: whether the pixels are turned as the orientation asks; otherwise they are as stored.
    """

    pixels: Tensor
    orientation: int
    is_upright: bool


def read_listed(path: Path, listed_size_wh: tuple[int, int] | None) -> DecodedImage:
    """Decode an image that an annotation file lists.

    Boxes count in one of two pictures: the pixels as stored, or the picture as people see it. The listed size decides:
    where width and height are those of the stored pixels exchanged, and the EXIF orientation exchanges them, the image
    is turned upright. Otherwise the pixels stay as stored, whatever the orientation: no size shows half a turn, and a
    square has only one.

    Args:
        path: the image file.
        listed_size_wh: width and height in the annotation file; None where it has none.

    Raises:
        UserError: the file cannot be read as an image.
    """
    return _decode(path, functools.partial(_is_listed_upright, listed_size_wh))


def read_upright(path: Path) -> DecodedImage:
    """Decode an image that no annotation file lists, as people see it: turned as its EXIF orientation says.

    Raises:
        UserError: the file cannot be read as an image.
    """
    return _decode(path, lambda size_wh, orientation: True)


def read_size(path: Path, listed_size_wh: tuple[int, int] | None) -> tuple[int, int] | None:
    """Width and height that `read_listed` would give, from the file's header alone; None where that cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            orientation, size_wh = _orientation(image), image.size
            if image.format == "TIFF":  # Pillow's size may be that of the picture upright
                size_wh = (
                    int(image.tag_v2[TiffImagePlugin.IMAGEWIDTH]),
                    int(image.tag_v2[TiffImagePlugin.IMAGELENGTH]),
                )
    except Exception:  # the decoder will say what is wrong
        return None
    return size_wh[::-1] if _is_listed_upright(listed_size_wh, size_wh, orientation) else size_wh


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Ends of the names of files in the formats that are read, in lower case and with their dots."""
    return tuple(suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO"))


def _is_listed_upright(listed_size_wh: tuple[int, int] | None, size_wh: tuple[int, int], orientation: int) -> bool:
    """Whether a listed size shows that boxes count in the picture turned upright, see `read_listed`."""
    return listed_size_wh == size_wh[::-1] != size_wh and orientation in SWAPPING


def _decode(path: Path, wants_upright: Callable[[tuple[int, int], int], bool]) -> DecodedImage:
    """Decode a file; `wants_upright` gets width and height of the stored pixels and the orientation."""
    try:
        content = io.BytesIO(path.read_bytes())  # one read; Pillow would make dozens of small ones
        with Image.open(content, formats=FORMATS) as image:
            orientation = _orientation(image)
            image.load()
            rgb, is_upright = _to_rgb(image), image.format == "TIFF"  # Pillow turns TIFF by itself
            stored_wh = rgb.size[::-1] if is_upright and orientation in SWAPPING else rgb.size
            wanted = wants_upright(stored_wh, orientation)
            if orientation in UPRIGHT_BY_ORIENTATION and wanted != is_upright:
                rgb = rgb.transpose(UPRIGHT_BY_ORIENTATION[orientation if wanted else _reverse(orientation)])
            return DecodedImage(functional.pil_to_tensor(rgb), orientation, wanted)
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file each of Pillow's decoders raises its own kinds
        unknown = isinstance(error, UnidentifiedImageError)  # its own words show an address in memory
        reason = "found no known format" if unknown else reason_of(error)
        raise UserError(f"{path} cannot be read as an image: {reason}") from None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is not loaded yet, 1 where it has none or a damaged one."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged EXIF block leaves the pixels as they are
        return 1
    return orientation if orientation in UPRIGHT_BY_ORIENTATION else 1


def _reverse(orientation: int) -> int:
    """The orientation whose turn undoes that of another: a quarter to the left that to the right, others themselves."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode, on white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey_to_rgb(image)
    if image.has_transparency_data:
        if image.mode == "La":  # which Pillow converts to nothing else
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits or in floating point, its range brought to 0..255.

    The range of 16 bits is all of it. Floats are taken from 0 to 1, 32 bits from 0 to 255 or to 65535, if no value lies
    outside; else from the least value of the image to the greatest.

    Raises:
        ValueError: a pixel is NaN or infinite.
    """
    pixels = np.asarray(image)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        if image.mode == "F" and not np.isfinite(pixels).all():
            raise ValueError(f"found {(~np.isfinite(pixels)).sum()} NaN or infinite pixels, expected finite numbers")
        if image.mode == "I" and _is_unsigned(image):
            pixels = pixels.view(np.uint32)
        usual = ((0, 1),) if image.mode == "F" else ((0, 255), SIXTEEN_BITS)
        own = (float(pixels.min()), float(pixels.max()))
        low, high = next((range_ for range_ in usual if range_[0] <= own[0] and own[1] <= range_[1]), own)
    else:
        low, high = SIXTEEN_BITS
    scaled = (pixels.astype(np.float64) - low) * (255 / (high - low or 1))
    levels = scaled.round().clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a level of a PNG
        levels = np.where(pixels == transparent, np.uint8(255), levels)
    return Image.fromarray(levels).convert("RGB")


def _is_unsigned(image: Image.Image) -> bool:
    """Whether a TIFF's integers have no sign; Pillow reads its 32 bits as signed ones all the same."""
    return image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 1  # and 2 signed
