"""Shapes, categories and textures of the demo set, in integer arithmetic.

Floating point or a drawing library may round differently on another processor or in another build, which would flip
pixels on edges. With integers, a seed gives the same pixels everywhere.
"""

from collections.abc import Callable

import numpy as np

UNIT = 1024  # half the extent of a shape in its own coordinates
SAMPLES = 4  # samples along each side of a pixel

# Cosines of 64 directions in 1/1024, written out so that no rounding depends on the platform.
_QUARTER = (1024, 1019, 1004, 980, 946, 903, 851, 792, 724, 650, 569, 483, 392, 297, 200, 100, 0)
COSINES = (*_QUARTER, *(-c for c in _QUARTER[-2:0:-1]), *(-c for c in _QUARTER), *_QUARTER[-2:0:-1])
DIRECTIONS = len(COSINES)

# Half width and half height in 1/64 of the half size: aspect ratios from 0.61 to 1.64 at one area.
ASPECTS = ((50, 82), (54, 76), (58, 71), (64, 64), (71, 58), (76, 54), (82, 50))


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    distance = u * u + v * v
    return (distance <= UNIT * UNIT) & (distance >= 520 * 520)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (v <= 760) & (np.abs(u) * 1784 <= (v + UNIT) * 1000)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= 860


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return a star of five points: fold the plane onto half a point, which is bounded by one straight edge."""
    cosine, sine = 828, 602  # of 36 degrees, in 1/1024
    u = np.abs(u)
    for side in (1, -1):
        over = np.maximum(side * cosine * u - sine * v, 0) >> 9  # twice the distance beyond the mirror
        u = u - (side * cosine * over >> 10)
        v = v + (sine * over >> 10)
    return (v - UNIT) * 301 + np.abs(u) * 610 <= 0


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return (np.maximum(u, v) <= UNIT) & (np.minimum(u, v) <= 340)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    shifted = u - 540
    return (u * u + v * v <= UNIT * UNIT) & (shifted * shifted + v * v >= 800 * 800)


# Ids have gaps as in COCO, so that they cannot serve as indices.
CATEGORIES: dict[int, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    1: ("ring", _ring),
    3: ("triangle", _triangle),
    4: ("square", _square),
    7: ("star", _star),
    9: ("cross", _cross),
    12: ("crescent", _crescent),
}


def shape_grid(half_size: int, aspect: int, direction: int) -> tuple[np.ndarray, np.ndarray]:
    """Return shape coordinates of the samples around an object's centre.

    Args:
        half_size: half the object's size in samples.
        aspect: index into `ASPECTS`.
        direction: rotation as index into `COSINES`.

    Returns:
        (u, v), each H x W int32 with H = W a multiple of `SAMPLES`; the shape spans about -UNIT..UNIT.
    """
    half_width, half_height = (max(1, half_size * part >> 6) for part in ASPECTS[aspect])
    reach = max(half_width, half_height) * 23 >> 4  # 23/16 is just above the root of two: room for a rotated corner
    reach = -(-(reach + 1) // SAMPLES) * SAMPLES
    along = np.arange(-2 * reach + 1, 2 * reach, 2, dtype=np.int32)  # sample centres, in half samples
    cosine, sine = COSINES[direction], COSINES[(direction - DIRECTIONS // 4) % DIRECTIONS]
    u = (cosine * along[None, :] + sine * along[:, None]) >> 6
    v = (cosine * along[:, None] - sine * along[None, :]) >> 6
    # 1/32 samples to shape units: times UNIT / (32 * half extent), as a multiplication and a shift.
    u = u * ((UNIT << 14) // (32 * half_width)) >> 14
    v = v * ((UNIT << 14) // (32 * half_height)) >> 14
    return u, v


def erode(mask: np.ndarray, steps: int) -> np.ndarray:
    """Return the part of a bool mask (H x W) at least `steps` samples from its edge along rows and columns."""
    inner = mask.copy()
    inner[steps:] &= mask[:-steps]
    inner[:-steps] &= mask[steps:]
    inner[:, steps:] &= mask[:, :-steps]
    inner[:, :-steps] &= mask[:, steps:]
    return inner


def coverage(mask: np.ndarray) -> np.ndarray:
    """Count the samples inside per pixel: bool (H * SAMPLES) x (W * SAMPLES) -> int16 H x W in 0..SAMPLES^2."""
    counts = mask.view(np.uint8)
    rows = sum(counts[i::SAMPLES] for i in range(1, SAMPLES)) + counts[::SAMPLES]
    return (sum(rows[:, i::SAMPLES] for i in range(1, SAMPLES)) + rows[:, ::SAMPLES]).astype(np.int16)


def background(generator: np.random.Generator, size: int) -> np.ndarray:
    """Draw a textured image without objects, int16 size x size x 3 in 0..255."""
    draw = generator.integers
    base = draw(40, 216, 3)
    other = base + draw(-52, 53, 3)
    x, y = np.arange(size, dtype=np.int32)[None, :], np.arange(size, dtype=np.int32)[:, None]
    direction = int(draw(DIRECTIONS))
    along = COSINES[direction] * x + COSINES[(direction + 16) % DIRECTIONS] * y >> 6  # 1/16 pixels
    across = COSINES[(direction + 16) % DIRECTIONS] * x - COSINES[direction] * y >> 6
    period = int(draw(size // 16, size // 5)) * 16
    kind = int(draw(5))
    if kind == 0:
        weight = (along - along.min()) * 64 // int(np.ptp(along))
    elif kind == 1:
        weight = np.abs(along % (2 * period) - period) * 64 // period
    elif kind == 2:
        weight = (along // period + across // period & 1) * 64
    elif kind == 3:
        weight = np.clip(np.abs(along % (2 * period) - period) * 256 // period - 96, 0, 64)
    else:
        weight = _value_noise(draw, size, int(draw(6, 14)))
    picture = base + ((other - base) * weight[..., None] >> 6)
    picture += (_value_noise(draw, size, int(draw(3, 7)))[..., None] - 32) * draw(8, 28) // 32
    for _ in range(int(draw(0, 6))):
        _faint_line(draw, picture, x, y)
    picture += draw(-5, 6, (size, size, 1))
    return np.clip(picture, 0, 255).astype(np.int16)


def _faint_line(draw: Callable, picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Blend a thin line of a random colour into the image, with an opacity of a sixth to a quarter."""
    size = picture.shape[0]
    direction = int(draw(DIRECTIONS))
    through_x, through_y = draw(0, size, 2)
    offset = COSINES[direction] * (x - through_x) + COSINES[(direction + 16) % DIRECTIONS] * (y - through_y)
    line = np.abs(offset) <= int(draw(size, 3 * size)) * 2
    picture[line] += (draw(0, 256, 3) - picture[line]) * draw(10, 17) >> 6


def _value_noise(draw: Callable, size: int, cells: int) -> np.ndarray:
    """Draw smooth noise: interpolate random values at (cells + 1)^2 grid points; int64 size x size in 0..64."""
    grid = draw(0, 65, (cells + 1, cells + 1))
    position = np.arange(size) * cells * 64 // size
    cell, part = position >> 6, position & 63
    rows = grid[cell] * (64 - part)[:, None] + grid[cell + 1] * part[:, None]
    return rows[:, cell] * (64 - part) + rows[:, cell + 1] * part >> 12


def object_colours(generator: np.random.Generator, behind: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Draw the colours of an object's pixels: a random colour in contrast to the background, shaded and textured.

    Args:
        generator: random generator.
        behind: mean background colour, 3 integers.
        u, v: shape coordinates of the pixels, each H x W.

    Returns:
        int32 H x W x 3 in 0..255.
    """
    draw = generator.integers
    colours = draw(16, 240, (8, 3))
    contrast = np.abs(colours - behind).sum(axis=1)
    clear = np.flatnonzero(contrast >= 180)
    colour = colours[clear[0] if len(clear) else contrast.argmax()].astype(np.int32)
    texture = int(draw(5)) if min(u.shape) >= 24 else 0  # a texture would hide the shape of a small object
    period = int(draw(260, 520))
    if texture == 1:
        pattern = (v // period & 1) * 36 - 18
    elif texture == 2:
        pattern = (u // period + v // period & 1) * 36 - 18
    elif texture == 3:
        dot_u, dot_v = u % period - period // 2, v % period - period // 2
        pattern = np.where(dot_u * dot_u + dot_v * dot_v < period * period // 12, 26, -8)
    else:
        pattern = np.zeros_like(u)
    shade = (u + v) * int(draw(-26, 27)) >> 11
    return np.clip(colour + (pattern + shade)[..., None], 0, 255)
