"""Which class each image of a flat folder or archive has: ILSVRC's devkit, or pairs in a text."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from alexkern.data.dataset import DataError

_IDS = "*validation_ground_truth.txt"
_METAS = ("meta.mat", "meta_clsloc.mat")  # the second since 2013
_PLACES = ("*devkit*/", "*devkit*.tar.gz", "*devkit*.tgz", "*val*.csv", "*val*.txt")


def find_ground_truth(folder: Path) -> Path:
    """The ground truth that lies in a folder: the devkit, a CSV or a text file, in this order.

    Raises:
        DataError: There is none.
    """
    for pattern in _PLACES:
        for path in sorted(folder.glob(pattern)):
            return path
    raise DataError(
        f"the validation images in {folder} are in no class folders, and no ground truth is "
        "there: put ILSVRC's devkit or a file of `image class` lines beside them, or name it by "
        "--ground-truth, or sort the images into class folders"
    )


def read_ground_truth(path: Path, images: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """The class of each image.

    Args:
        path: ILSVRC's devkit (folder or archive), its file of one id per line with meta.mat
            beside it, or a file with an image and its class in each line, parted by blanks or a
            comma. Images may go without their extension there; what follows the class is ignored.
        images: The file names, sorted: the order of a file of ids.
        class_names: The classes of the training set.

    Raises:
        DataError: It cannot be read, or does not fit the images or the classes.
    """
    try:
        name, files = _read(path)
        text = files[name].decode("utf-8-sig", "surrogateescape")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"cannot read the ground truth {path} ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if all(line.isdecimal() for line in lines):
        named = _by_ids(path, lines, images, _class_of_id(path, files))
    else:
        named = _by_pairs(path, lines, images, class_names)
    known = set(class_names)
    for image, class_name in zip(images, named, strict=True):
        if class_name not in known:
            raise DataError(
                f"{path}: {image} is of class {class_name!r}, which the training set lacks"
            )
    return named


def _read(path: Path) -> tuple[str, dict[str, bytes]]:
    """The name of the file that tells the classes, and its and the tables' contents by name."""

    def wanted(name: str) -> bool:
        return fnmatch(name, _IDS) or name in _METAS

    files = {}
    if path.is_dir():
        files = {file.name: file.read_bytes() for file in path.rglob("*") if wanted(file.name)}
    elif path.name.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if wanted(name) and (file := archive.extractfile(member)):
                    files[name] = file.read()
    else:
        metas = [meta for name in _METAS if (meta := path.with_name(name)).is_file()]
        return path.name, {file.name: file.read_bytes() for file in (path, *metas)}
    for name in files:
        if fnmatch(name, _IDS):
            return name, files
    raise DataError(f"{path} holds no {_IDS}: it is not the devkit with the ground truth")


def _by_ids(
    path: Path, lines: Sequence[str], images: Sequence[str], class_of_id: Mapping[int, str]
) -> list[str]:
    if len(lines) != len(images):
        raise DataError(f"{path} has {len(lines)} lines for {len(images)} validation images")
    for number, line in enumerate(lines, 1):
        if int(line) not in class_of_id:
            raise DataError(f"{path}: line {number} holds {line}, which is no id in meta.mat")
    return [class_of_id[int(line)] for line in lines]


def _class_of_id(path: Path, files: Mapping[str, bytes]) -> dict[int, str]:
    """ILSVRC's ids and the classes (WordNet's ids) that they stand for."""
    metas = [files[name] for name in _METAS if name in files]
    if not metas:
        raise DataError(f"{path} holds ids, but no meta.mat that says what they mean is beside it")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"the devkit's meta.mat needs scipy: pip install scipy ({error})"
        ) from error
    try:
        synsets = loadmat(io.BytesIO(metas[0]), squeeze_me=True)["synsets"]
        (ids,) = (name for name in synsets.dtype.names if name.endswith("_ID"))
        pairs = zip(synsets[ids].flat, synsets["WNID"].flat, strict=True)
        return {int(number): str(class_name) for number, class_name in pairs}
    except Exception as error:  # of whatever a damaged file makes of it
        raise DataError(f"cannot read the meta.mat of {path} ({error}): fetch it again") from error


def _by_pairs(
    path: Path, lines: Sequence[str], images: Sequence[str], class_names: Sequence[str]
) -> list[str]:
    names = {image: image for image in images} | {Path(image).stem: image for image in images}
    class_of_image: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, _, rest = (part.strip() for part in line.partition("," if "," in line else " "))
        class_name = (rest.replace(",", " ").split() or [""])[0]
        image = names.get(name)
        if image is None:
            if number == 1 and class_name not in class_names:
                continue  # a head line
            raise DataError(f"{path}: line {number} names {name!r}, which is no validation image")
        if image in class_of_image:
            raise DataError(f"{path}: line {number} names {name!r} for the second time")
        class_of_image[image] = class_name
    without = [image for image in images if image not in class_of_image]
    if without:
        raise DataError(f"{path} has no line for {without[0]} ({len(without)} in all)")
    return [class_of_image[image] for image in images]
