"""Weights in and out: safetensors, torchvision's files, checkpoints."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexkern.files import load_torch, replacing
from alexkern.models.network import TORCHVISION_NAMES, AlexNet, renamed

_SUFFIX = ".safetensors"
_SHOWN = 3  # problems that an error names


def save_weights(model: AlexNet, path: str | os.PathLike[str]) -> None:
    """Write a network's weights to a safetensors file: whole, or not at all.

    Its metadata hold the preset, the number of classes, and a SHA-256 of all tensors' bytes, one
    after the other in the order of their names, as the format has no checksum.

    Args:
        model: The network; its weights are written in their dtype.
        path: File to write or to replace, ``*.safetensors``.

    Raises:
        ValueError: Another suffix.
        ImportError: safetensors is not installed.
        OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix != _SUFFIX:
        raise ValueError(f"weights are written to a {_SUFFIX} file, got {str(path)!r}")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    metadata = {
        "format": "pt",  # of the safetensors format: whose tensors these are
        "preset": model.preset.name,
        "classes": str(model.num_classes),
        "sha256": _digest(tensors),
    }
    content = _safetensors().torch.save(tensors, metadata)
    with replacing(path) as file:
        file.write(content)


def load_weights(
    model: AlexNet,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    new_head: bool = False,
) -> None:
    """Give a network weights that were saved, or leave it as it is and say why.

    They take the dtype, device and layout of the model's.

    Args:
        model: The network.
        source: A ``.safetensors`` file; another file that ``torch.save`` wrote, such as
            torchvision's weights or a checkpoint of a run (read without running code); or
            a state dict. The names are this network's or torchvision's.
        new_head: Leave fc8 as the model has it, to train it on classes of one's own. ``source``
            may have any number of classes then.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged or of another kind, says that its weights are another
            preset's, or holds names or shapes that are not the model's.
        ImportError: safetensors is needed and not installed.
    """
    weights = _given(source)
    if weights.preset not in (None, model.preset.name):
        raise ValueError(
            f"{weights.origin} has the weights of preset {weights.preset!r}, the model is "
            f"{model.preset.name!r}: make it with alexnet({weights.preset!r}, ...)"
        )
    state, expected = renamed(weights.tensors), dict(model.state_dict())
    if new_head:
        state, expected = _without_head(state), _without_head(expected)
    _check_fit(state, expected, model, weights.origin)
    model.load_state_dict(state, strict=not new_head)


def torchvision_state_dict(model: AlexNet) -> dict[str, Tensor]:
    """The state dict of a model of preset ``owt`` with the names of torchvision's ``alexnet``.

    Raises:
        ValueError: Another preset, which torchvision has no network for.
    """
    if model.preset.name != "owt":
        raise ValueError(f"torchvision's alexnet is preset 'owt', the model is {_named(model)}")
    theirs = {ours: name for name, ours in TORCHVISION_NAMES.items()}
    split = ((name.rsplit(".", 1), tensor) for name, tensor in model.state_dict().items())
    return {f"{theirs[layer]}.{kind}": tensor for (layer, kind), tensor in split}


class _Weights(NamedTuple):
    """What was given, where from, and the preset that it is said to be of."""

    tensors: Mapping[str, Tensor]
    origin: str
    preset: str | None = None


def _given(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> _Weights:
    if isinstance(source, Mapping):
        return _Weights(source, "the state dict")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights at {path}")
    return _from_safetensors(path) if path.suffix == _SUFFIX else _from_torch(path)


def _from_safetensors(path: Path) -> _Weights:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    if metadata.get("sha256", "") not in ("", _digest(tensors)):
        raise ValueError(
            f"{path} is damaged: its tensors do not have the SHA-256 that was written with them; "
            "take another copy"
        )
    return _Weights(tensors, str(path), metadata.get("preset"))


def _from_torch(path: Path) -> _Weights:
    try:
        content = load_torch(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable file of weights ({error})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    if isinstance(content.get("model"), Mapping):  # a run's checkpoint
        options = content.get("options")
        preset = options.get("preset") if isinstance(options, Mapping) else None
        return _Weights(content["model"], str(path), preset)
    return _Weights(content, str(path))


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc8.")}


def _check_fit(
    state: Mapping[str, Any], expected: Mapping[str, Tensor], model: AlexNet, origin: str
) -> None:
    there = {name: _form(value) for name, value in state.items()}
    here = {name: _form(tensor) for name, tensor in expected.items()}
    wrong = [name for name in here if name in there and there[name] != here[name]]
    problems = [
        *(f"{name} is {there[name]} instead of {here[name]}" for name in wrong),
        *(f"{name} is missing" for name in here if name not in there),
        *(f"{name} is unknown" for name in there if name not in here),
    ]
    if not problems:
        return
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    only_head = all(problem.startswith("fc8.") for problem in problems)
    fix = " (new_head=True, or --new-head, keeps the model's own fc8)" if only_head else ""
    raise ValueError(
        f"{origin} does not fit {_named(model)}: {'; '.join(problems[:_SHOWN])}{more}{fix}"
    )


def _form(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    shape = str(list(value.shape))
    return shape if value.is_floating_point() else f"{shape} of {value.dtype}"


def _named(model: AlexNet) -> str:
    return f"{model.preset.name!r} with {model.num_classes} classes"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"safetensors files need the package: pip install safetensors ({error})"
        ) from error
    return safetensors
