"""Decode image files; every part of the program that reads images uses this module.

Every mode becomes 8-bit RGB. `read_listed` defines when an image is rotated by its EXIF orientation.
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

# Raster formats only: for others Pillow starts programs (EPS) or reads files that the file refers to.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
if "avif" in features.get_supported_modules():  # since Pillow 11.3
    FORMATS += ("AVIF",)
SIXTEEN_BITS = (0, 65535)
# The transpose that turns stored pixels upright, by EXIF orientation; 1 is upright.
UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING = (5, 6, 7, 8)  # orientations that swap width and height
HALF_TURNS = (2, 3, 4)  # orientations that do not


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image file.

    Attributes:
        pixels: RGB, uint8 3 x H x W.
        orientation: EXIF orientation, 1 (upright or missing) to 8.
        is_upright: whether the pixels are turned upright by the orientation; otherwise they are as stored.
    """

    pixels: Tensor
    orientation: int
    is_upright: bool


def read_listed(path: Path, listed_size_wh: tuple[int, int] | None) -> DecodedImage:
    """Decode an image that an annotation file lists.

    Boxes may refer to the stored pixels or to the upright image. The listed size decides: if it is the stored size with
    width and height swapped, and the EXIF orientation swaps them, the image is turned upright. Otherwise the pixels
    stay as stored, since a size cannot reveal a half turn, a reflection, or a turn of a square image.

    Args:
        path: the image file.
        listed_size_wh: width and height in the annotation file, or None.

    Raises:
        UserError: the file cannot be read as an image.
    """
    return _decode(path, functools.partial(_is_listed_upright, listed_size_wh))


def read_upright(path: Path) -> DecodedImage:
    """Decode an image that no annotation file lists, turned upright by its EXIF orientation.

    Raises:
        UserError: the file cannot be read as an image.
    """
    return _decode(path, lambda size_wh, orientation: True)


def read_size(path: Path, listed_size_wh: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the width and height that `read_listed` would give, from the file's header; None if it is unreadable."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            orientation, size_wh = _orientation(image), image.size
            if image.format == "TIFF":  # Pillow's size may be that of the upright image
                size_wh = (
                    int(image.tag_v2[TiffImagePlugin.IMAGEWIDTH]),
                    int(image.tag_v2[TiffImagePlugin.IMAGELENGTH]),
                )
    except Exception:  # decoding reports the error
        return None
    return size_wh[::-1] if _is_listed_upright(listed_size_wh, size_wh, orientation) else size_wh


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Return the file name suffixes of the supported formats, in lower case and with their dots."""
    return tuple(suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO"))


def _is_listed_upright(listed_size_wh: tuple[int, int] | None, size_wh: tuple[int, int], orientation: int) -> bool:
    """Return whether the listed size is that of the upright image; see `read_listed`."""
    return listed_size_wh == size_wh[::-1] != size_wh and orientation in SWAPPING


def _decode(path: Path, wants_upright: Callable[[tuple[int, int], int], bool]) -> DecodedImage:
    """Decode a file; `wants_upright` is called with the stored (width, height) and the orientation."""
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
    except Exception as error:  # each of Pillow's decoders raises other errors for damaged files
        unknown = isinstance(error, UnidentifiedImageError)  # its message contains a memory address
        reason = "found no known format" if unknown else reason_of(error)
        raise UserError(f"{path} cannot be read as an image: {reason}") from None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that is not loaded yet; 1 if it is missing or damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the EXIF block is damaged
        return 1
    return orientation if orientation in UPRIGHT_BY_ORIENTATION else 1


def _reverse(orientation: int) -> int:
    """Return the orientation that undoes another: quarter turns swap, all others undo themselves."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB; transparent pixels are blended with white."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey_to_rgb(image)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow converts La only to LA
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy an RGB image


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Scale grey values of more than 8 bits or in floating point to 0..255.

    16-bit images use their full range. Floats use 0 to 1, and 32-bit integers 0 to 255 or 0 to 65535, if all values lie
    within; otherwise the range is from the image's minimum to its maximum.

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
    """Return whether a TIFF's integers are unsigned; Pillow always reads 32-bit ones as signed."""
    return image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 1  # and 2 signed
