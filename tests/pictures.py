"""Images and folders of images that tests of the data pipeline share."""

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """Large patches of colour, as a photograph has, which JPEG keeps."""
    return Image.fromarray(noise(4, 5, seed)).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    """An array or a Pillow image as the bytes of a file."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file of any kind; each of ``rows`` begins with its filter."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def class_folders(root: Path, images: int = 5, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """``train`` with so many images per class and ``val`` with two, all different."""
    seed = 0
    for split, count in (("train", images), ("val", 2)):
        for class_name in classes:
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for number in range(count):
                seed += 1
                file = folder / f"{split}_{class_name}_{number}.JPEG"
                file.write_bytes(encoded(smooth(40, 30 + seed % 20, seed), "JPEG", quality=90))
    return root


def archive(files: dict[str, bytes]) -> bytes:
    """An uncompressed tar file."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    """All files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
