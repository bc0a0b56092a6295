"""Reading checkpoint files without running their code, and checking them against a model before it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deploykit.errors import MissingDependency, WeightsError
from deploykit.optional import require

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""What a checkpoint file ends with; all but the first are read with ``torch.load(weights_only=True)``."""

_LISTED = 10


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    A state dict nested under ``state_dict`` or ``model`` is taken out, and a ``module.`` prefix
    that every name has (``DataParallel``) is cut.

    Raises:
        WeightsError: no such file, a folder, another suffix, damaged, a pickle with code in it, or
            not a state dict.
    """
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; expected a checkpoint file ({', '.join(SUFFIXES)}). Name the file.")
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; expected a checkpoint. Check the path.")
    if path.suffix not in SUFFIXES:
        raise WeightsError(
            f"{path.name} ends with {path.suffix or 'no suffix'}; expected one of {', '.join(SUFFIXES)}. "
            "Save the state dict with safetensors.torch.save_file, or rename the file to what it is."
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _state_dict(content, path)


def _read_safetensors(path: Path) -> Any:
    try:
        return require("safetensors.torch").load_file(str(path))
    except MissingDependency:
        raise
    except Exception as error:  # the parser of a damaged file may raise anything
        raise WeightsError(
            f"{path} is not a readable safetensors file ({error}). Copy or download it again."
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler of a damaged file may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{path} cannot be read as tensors only ({reason}). It is damaged, or holds pickled code, which "
            "deploykit never runs. Copy it again, or save just model.state_dict() where you trust the file."
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected a state dict: names to tensors.")
    foreign = [f"{key} ({type(value).__name__})" for key, value in content.items() if not torch.is_tensor(value)]
    if foreign:
        raise WeightsError(
            f"{path} is not a state dict: {_listed(foreign)} are not tensors. Save model.state_dict() alone, "
            "or under the key 'state_dict'."
        )
    prefix = "module."
    cut = len(prefix) if all(str(key).startswith(prefix) for key in content) else 0
    return {str(key)[cut:]: value for key, value in content.items()}


def check_state(state: Mapping[str, Tensor], model: Mapping[str, Tensor], *, source: str, name: str) -> None:
    """Compare a checkpoint's names, shapes and values with a model's state dict.

    Raises:
        WeightsError: lists missing, unexpected, misshapen and non-finite tensors, the first ten of each.
    """
    missing = [f"{key} {tuple(value.shape)}" for key, value in model.items() if key not in state]
    unexpected = [f"{key} {tuple(value.shape)}" for key, value in state.items() if key not in model]
    both = [(key, value, model[key]) for key, value in state.items() if key in model]
    misshapen = [
        f"{key} {tuple(value.shape)} instead of {tuple(expected.shape)}"
        for key, value, expected in both
        if value.shape != expected.shape
    ]
    broken = [key for key, value, _ in both if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "with NaN or infinity": broken}
    found = [f"{len(keys)} {fault}: {_listed(keys)}" for fault, keys in faults.items() if keys]
    if found:
        raise WeightsError(
            f"{source} does not fit {name}, which has {len(model)} tensors. {'. '.join(found)}. "
            "Nothing was loaded. Give the checkpoint of this variant, in timm's parameter names."
        )


def _listed(keys: Iterable[str]) -> str:
    names = list(keys)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
