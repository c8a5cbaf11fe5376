"""Pictures of any file type and mode, read as upright, opaque pixels of 8 bits."""

from __future__ import annotations

import io
from collections.abc import Callable
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Mode = Literal["L", "RGB"]
"""Mode of a Pillow image: one channel, or three."""
BACKGROUND = 255
"""Value of all channels behind transparent pixels: white, as on a page."""
THUMBNAIL = (96, 96)
"""Largest width and height of a picture in a report."""
_TOPS = (255, 65535)
_OVERSHOOT = 0.1  # fraction of a range that interpolation may leave it by
_LONGEST = 20  # largest ratio of the sides of a picture that is scaled as a whole
_KEY_BITS = {"L;2": 85, "L;4": 17}  # what Pillow scales the pixels of such PNGs by, not their key


def read_picture(source: str | PathLike[str] | IO[bytes] | Image) -> Image:
    """Decode a picture as upright, opaque pixels of 8 bits.

    - It is turned as its EXIF orientation says; of an animation the first frame is read.
    - Transparent pixels are composited over white, so that colours which nobody sees have no
      effect.
    - 16-bit integers are scaled from [0, 65535]. Floats and 32-bit integers have no range of their
      own: pixels in [0, 1] (floats only), [0, 255] or [0, 65535] are scaled from the first of these
      that holds them, give or take a tenth of it; any others from their minimum and maximum.
    - CMYK, LAB, HSV, YCbCr and palettes become RGB.

    Args:
        source: File, binary stream, or image of Pillow's, which is not changed.

    Returns:
        Image of mode L where the picture has one channel, besides alpha, else of mode RGB.

    Example:
        >>> from PIL import Image
        >>> read_picture(Image.new("RGBA", (1, 1), (200, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
        >>> read_picture(Image.new("F", (1, 1), 0.5)).getpixel((0, 0))
        128
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        found = _decoded(source)
    else:
        with Image.open(source) as picture:
            found = _decoded(picture)
    found.info.clear()  # with the orientation, or it would be turned again
    return found


def _decoded(file: Image) -> Image:
    key = _key_colour(file)
    file.load()
    picture = _upright(file)
    if key is not None:
        picture.info["transparency"] = key
    if picture.mode[0] in "IF":
        return _from_wide(picture, file)
    if picture.mode == "LAB":
        return _from_lab(picture)
    grey = is_grey(picture)
    if picture.has_transparency_data:
        picture = _opaque(picture)
    return picture.convert("L" if grey else "RGB")


def is_grey(picture: Image) -> bool:
    """Return whether a picture, which need not be decoded, has one channel besides alpha."""
    return picture.mode in ("1", "L", "LA", "La") or picture.mode[0] in "IF"


def _upright(picture: Image) -> Image:
    """Return a picture turned as its EXIF says, in a copy."""
    from PIL.ExifTags import Base
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(picture.getexif().get(Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - damaged EXIF may end in any error, and the pixels are intact
        turn = None
    return picture.copy() if turn is None else picture.transpose(turn)


def _opaque(picture: Image) -> Image:
    """Composite a picture over the background."""
    from PIL import Image

    # Pillow has no way from premultiplied grey to RGBA
    picture = picture.convert("LA") if picture.mode == "La" else picture
    background = Image.new("RGBA", picture.size, (BACKGROUND,) * 3 + (255,))
    return Image.alpha_composite(background, picture.convert("RGBA")).convert("RGB")


def _key_colour(file: Image) -> int | tuple[int, ...] | None:
    """Return the transparent colour of a PNG whose channels do not have 8 bits, as its pixels.

    Its depth is known until it is decoded.
    """
    key, tiles = file.info.get("transparency"), getattr(file, "tile", ())
    depth = tiles[0][3] if tiles and file.format == "PNG" else None
    if isinstance(key, int) and isinstance(depth, str) and depth in _KEY_BITS:
        return key * _KEY_BITS[depth]
    if isinstance(key, tuple) and depth == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return None


def _from_wide(picture: Image, file: Image) -> Image:
    """Return a picture of 16-bit or 32-bit integers or floats in 8 bits.

    Args:
        picture: Pixels, upright.
        file: The same as it was opened, with its format and tags.
    """
    from PIL import Image

    pixels = np.asarray(picture)
    values = pixels.astype(np.float64)
    low, high = _range(file, values[np.isfinite(values)])
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = ((values - low) * (255 / (high - low))).clip(0, 255)
    if _tag(file, 262) == 0:  # PhotometricInterpretation: white is zero
        scaled = 255 - scaled
    grey = scaled.round().astype(np.uint8)
    key = picture.info.get("transparency")
    if isinstance(key, int):
        grey[pixels == key] = BACKGROUND
    return Image.fromarray(grey)


def _range(file: Image, values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the values that become 0 and 255, see `read_picture`."""
    if file.mode.startswith("I;16"):
        bits = _tag(file, 258)  # BitsPerSample: 12 of some TIFFs
        return 0.0, 2.0**bits - 1 if bits else 65535.0
    if file.mode == "I" and file.format in ("PNG", "PPM"):
        return 0.0, 65535.0
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if low >= -_OVERSHOOT * max(high, 1):
        for top in (1, *_TOPS) if file.mode == "F" else _TOPS:
            if high <= (1 + _OVERSHOOT) * top:
                return 0.0, float(top)
    return low, high if high > low else low + 1


def _tag(file: Image, number: int) -> int | None:
    """Return the first value of a tag, where the file is a TIFF with one."""
    value: Any = getattr(file, "tag_v2", {}).get(number)
    found: int | None = value[0] if isinstance(value, tuple) else value
    return found


def _from_lab(picture: Image) -> Image:
    from PIL import Image, ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    found = Image.new("RGB", picture.size)
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(picture, found)


def read_or_raise(read: Callable[[], Image], source: str) -> Image:
    """Return the result of `read`, with any error of Pillow's turned into one that names `source`.

    Raises:
        ValueError: A picture that cannot be read.
    """
    try:
        return read()
    except Exception as error:  # what is no picture may end in any error of a decoder
        reason = str(error) or type(error).__name__
        if type(error).__name__ == "DecompressionBombError":
            reason = "it has more pixels than Pillow decodes: scale it down"
        raise ValueError(f"every image must be readable, got {source} ({reason})") from error


def square(picture: Image, size: int) -> Image:
    """Scale the shorter side of a picture to `size` pixels and cut its centre out."""
    from PIL.Image import Resampling

    width, height = picture.size
    longest = _LONGEST * min(width, height)
    if max(width, height) > longest:  # scaled as a whole, its ends would take memory for nothing
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        picture = picture.crop((left, top, width - left, height - top))
        width, height = picture.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """Return an image `[channels, height, width]` as a PNG file of at most 96 x 96 pixels."""
    from PIL import Image

    pixels = pixels.transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    picture.save(file, format="png", optimize=True)
    return file.getvalue()
