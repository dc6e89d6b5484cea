"""Image files to square uint8 RGB images: the one decoder of folders and of ``prepare``."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

# What photographs come in. Others are refused: Pillow hands PostScript to Ghostscript, for one.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_PHOTOMETRIC = 262  # a tag of TIFF
_ORIENTATION = 274  # a tag of EXIF and TIFF; 1, or none, is upright
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image cannot be used; the message is the reason, in one line without the file's name."""


def decode(file: Path | BinaryIO, size: int) -> NDArray[np.uint8]:
    """One image: upright by its EXIF tag, shorter side to ``size``, central square (paper §2).

    Grey and palettes become RGB, 16 bits per channel 8; of CMYK Pillow's plain conversion is taken,
    of transparent images the colours without the transparency, of animations the first frame.

    Args:
        file: A path, or a file opened in binary mode.
        size: Side of the result.

    Returns:
        uint8 RGB [size, size, 3].

    Raises:
        ImageError: It is no image, damaged, cut off, too large (more than Pillow's
            ``Image.MAX_IMAGE_PIXELS``) or of a kind without a scale for its values.
    """
    try:
        with _strict(), Image.open(file, formats=FORMATS) as image:
            image.load()
            upright = _upright(_rgb(image), _orientation(image))
            side = min(upright.size)
            left, top = (upright.width - side) // 2, (upright.height - side) // 2
            # One resampling of the central square: scaling it whole first gives the same pixels.
            box = (left, top, left + side, top + side)
            square = upright.resize((size, size), Image.Resampling.BILINEAR, box)
    except UnidentifiedImageError as error:  # its message holds an address in memory
        raise ImageError(f"no image of a known kind ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise many types
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(message.split())
        raise ImageError(reason) from error
    return np.asarray(square)


@contextmanager
def _strict() -> Iterator[None]:
    """Pillow's doubts about an image's size are errors, and so are files that were cut off."""
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # EXIF data that cannot be read, and the like
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _rgb(image: Image.Image) -> Image.Image:
    """In eight bits per channel. ``convert`` alone would clip what has more, not scale it."""
    # Grey PNG and PGM files of 16 bits come in mode I from older Pillows.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # of TIFF: white is zero
            values = 65535 - values
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ImageError(f"pixels are {kind}, whose scale is unknown: convert it to 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turned and mirrored as cameras ask for."""
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    """Of a loaded image (TIFF files are turned by Pillow while they load)."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF data in ruins does no harm to the pixels
        return 1
