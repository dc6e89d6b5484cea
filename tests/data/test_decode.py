import io
import os
import warnings

import numpy as np
import pytest
from pictures import encoded, noise, png, smooth
from PIL import Image, ImageFile

from alexkern.data.decode import ImageError, decode


def decoded(content, size=8):
    return decode(io.BytesIO(content), size)


def refusal(content):
    with pytest.raises(ImageError) as error:
        decoded(content)
    message = str(error.value)
    assert message
    assert "\n" not in message
    assert "0x" not in message  # an address would make two reports differ
    return message


# Where the file's first row and first column belong, as the EXIF standard has it.
UPRIGHT = {
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: np.rot90(a, -1),  # right, top
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda a: np.rot90(a),  # left, bottom
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_as_their_exif_tag_says(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    stored = encoded(noise(30, 41), kind, **options)
    pixels = np.asarray(Image.open(io.BytesIO(stored)))  # a JPEG's are not those that went in
    tagged = encoded(noise(30, 41), kind, exif=exif, **options)
    upright = encoded(np.ascontiguousarray(UPRIGHT[orientation](pixels)), "PNG")
    assert (decoded(tagged, 20) == decoded(upright, 20)).all()


def test_exif_data_in_ruins_does_no_harm():
    image = smooth(30, 40)
    for exif in (
        b"Exif\0\0rubbish",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ruined = decoded(encoded(image, "JPEG", exif=exif))
        assert (ruined == decoded(encoded(image, "JPEG"))).all()


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "white is zero", "PGM"])
def test_grey_of_16_bits_is_scaled(kind):
    if kind == "PGM":
        content = b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes()
    elif kind == "big-endian TIFF":
        content = encoded(
            Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes()), "TIFF"
        )
        assert content.startswith(b"MM")
    elif kind == "white is zero":
        content = encoded(65535 - RAMP, "TIFF", tiffinfo={262: 0})
    else:
        content = encoded(RAMP, kind)
    expected = np.rint(RAMP / 257)[..., None].repeat(3, -1)
    assert (decoded(content, 256) == expected).all()


def test_colours_of_16_bits_are_scaled():
    values = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    found = decoded(png(256, 256, 16, 2, rows), 256)
    assert np.abs(found - values / 257).max() <= 1  # Pillow drops the lower byte


@pytest.mark.parametrize(("mode", "what"), [("I", "32-bit integers"), ("F", "floating-point")])
def test_numbers_without_a_scale_are_refused(mode, what):
    assert what in refusal(encoded(Image.new(mode, (9, 9), 300), "TIFF"))


def test_modes_give_their_colours():
    colour = noise(8, 8)
    grey = colour[..., 0]
    binary = (grey > 99).astype(np.uint8) * 255
    alpha = noise(8, 8, 1)[..., :1]
    palette = Image.fromarray(colour).quantize(16)
    cases = [
        (encoded(grey, "PNG"), grey),
        (encoded(Image.fromarray(binary).convert("1"), "PNG"), binary),
        (encoded(np.concatenate([colour, alpha], -1), "PNG"), colour),
        (encoded(np.concatenate([grey[..., None], alpha], -1), "PNG"), grey),
        (encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        (encoded(palette, "PNG", transparency=3), np.asarray(palette.convert("RGB"))),
        (
            encoded(palette, "PNG", transparency=bytes(range(16))),
            np.asarray(palette.convert("RGB")),
        ),
    ]
    for content, expected in cases:
        if expected.ndim == 2:
            expected = expected[..., None].repeat(3, -1)
        assert (decoded(content) == expected).all()


def in_rgb(cmyk):
    """Each ink lets through what it does not cover, and black covers all."""
    cmyk = cmyk.astype(float)
    return (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255


@pytest.mark.parametrize(
    "ink", [(255, 0, 0, 0), (0, 255, 255, 0), (10, 200, 90, 60), (0, 0, 0, 255)]
)
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind, ink):
    content = encoded(Image.new("CMYK", (16, 16), ink), kind)
    if kind == "JPEG":
        assert b"Adobe" in content  # with every value inverted
    assert np.abs(decoded(content) - in_rgb(np.array([[ink]]))).max() <= 2


def test_cmyk_as_luminance_and_chrominance():
    """Adobe's YCCK: what a JPEG of Photoshop holds."""
    ink = 10, 200, 90, 60
    red, green, blue, black = ink  # the complement of the inks, and that inverted by Adobe
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    chrominance = 128 + (blue - luminance) / 1.772, 128 + (red - luminance) / 1.402
    # Pillow inverts what it writes.
    stored = [255 - round(value) for value in (luminance, *chrominance)]
    content = bytearray(encoded(Image.new("CMYK", (16, 16), (*stored, black)), "JPEG"))
    content[content.index(b"Adobe") + 11] = 2  # the transform: YCCK
    assert np.abs(decoded(bytes(content)) - in_rgb(np.array([[ink]]))).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_animations_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decoded(content) == (255, 0, 0)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_any_shape_will_do(shape):
    content = encoded(np.full((*shape, 3), (1, 2, 3), np.uint8), "PNG")
    assert (decoded(content, 12) == (1, 2, 3)).all()


SAVED = {
    "JPEG": {"quality": 90},
    "progressive": {"format": "JPEG", "progressive": True},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "PPM": {},
    "TIFF": {},
    "LZW": {"format": "TIFF", "compression": "tiff_lzw"},
    "WEBP": {},
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("lenient", [False, True])
def test_cut_off_files_are_refused(kind, lenient, monkeypatch):
    """Wherever they end; only marks of the end may be missing."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    options = dict(SAVED[kind])
    content = encoded(smooth(50, 60), options.pop("format", kind), **options)
    whole = decoded(content, 50)
    lengths = {*range(0, len(content), len(content) // 40), *range(len(content) - 8, len(content))}
    refused = 0
    for length in lengths:
        try:
            assert (decoded(content[:length], 50) == whole).all()
        except ImageError:
            refused += 1
    assert refused >= len(lengths) - 8
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize("side", [10_000, 14_000])
def test_bombs_are_refused_before_they_go_off(side):
    """Of the first Pillow would only warn."""
    content = png(side, side, 8, 2, b"")
    assert len(content) < 100
    assert "decompression bomb" in refusal(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", os.urandom(999), b"\xff\xd8\xff"],
)
def test_what_is_no_image_is_refused(content):
    assert "no image of a known kind" in refusal(content)


def test_what_the_file_is_called_does_not_count(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(noise(8, 8), "PNG"))
    assert (decode(tmp_path / "a.jpg", 8) == noise(8, 8)).all()


def test_want_of_memory_is_a_reason(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert refusal(encoded(noise(8, 8), "PNG")) == "MemoryError"
