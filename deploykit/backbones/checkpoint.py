"""Read checkpoint files without running their code: torch, safetensors, and either in shards."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deploykit.backbones.checkpoint_names import (
    IN_FOLDERS,
    INDEX,
    SAFETENSORS,
    SUFFIXES,
    checkpoint_in,
    is_checkpoint_name,
)
from deploykit.backbones.pickle_allowlist import allowed_globals
from deploykit.errors import WeightsError
from deploykit.optional import require

if TYPE_CHECKING:
    from torch import Tensor

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_REFUSED_GLOBAL = re.compile(r"(?:Unsupported global|unsupported GLOBAL|Unsupported class):? *(?:GLOBAL )?([\w.]+)")

_OTHER_PROTOCOL = re.compile(r"Detected pickle protocol|Unsupported operand 1[45]\d")
"""How torch refuses a pickle of protocol 3 or later: it knows the operands of protocol 2."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """A checkpoint that was read: what it holds, and the metadata of a safetensors header."""

    path: Path
    content: Mapping[str, object]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(path: Path) -> CheckpointFile:
    """Read a checkpoint onto the CPU.

    Args:
        path: a safetensors or torch file, the index of a sharded one, or a folder that holds one of `IN_FOLDERS`.

    Raises:
        WeightsError: no such file, another suffix, damaged, or a pickle with code in it, which is named.
    """
    listed = ", ".join(SUFFIXES)
    if path.is_dir():
        inside = checkpoint_in(path)
        if inside is None:
            raise WeightsError(
                f"{path} is a folder without {' or '.join(IN_FOLDERS)}; expected a checkpoint file ({listed}). "
                "Name the file."
            )
        path = inside
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; expected a checkpoint. Check the path.")
    name = path.name.lower()
    if not is_checkpoint_name(name):
        raise WeightsError(
            f"{path.name} ends with {path.suffix or 'no suffix'}; expected one of {listed}. "
            "Save the state dict with safetensors.torch.save_file, or rename the file to what it is."
        )
    try:
        with path.open("rb") as opened:
            empty = not opened.read(1)
    except OSError as error:
        raise WeightsError(f"{path} cannot be opened: {error.strerror}. Check its permissions.") from error
    if empty:
        raise WeightsError(f"{path} is empty. Copy or download it again.")
    if name.endswith(INDEX):
        return _read_shards(path)
    return _read_safetensors(path) if name.endswith(SAFETENSORS) else _read_torch(path)


def _read_safetensors(path: Path) -> CheckpointFile:
    tensors = require("safetensors")
    content: dict[str, Tensor] = {}
    try:
        with tensors.safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            content.update((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118  (no mapping)
    except Exception as error:  # the parser of a damaged file may raise anything
        raise WeightsError(
            f"{path} is not a readable safetensors file: {_what_is_wrong(path, error)}. Copy or download it again."
        ) from error
    return CheckpointFile(path=path, content=content, metadata=metadata)


def _read_torch(path: Path) -> CheckpointFile:
    if _is_torchscript(path):
        raise WeightsError(
            f"{path} is a TorchScript archive, which holds code. Fix: where you trust the file, "
            "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')."
        )
    with allowed_globals():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler of a damaged file may raise anything
            refused = _refused_globals(path, error)
            if refused:
                raise WeightsError(
                    f"{path} holds pickled code beside its tensors: {', '.join(refused)}; deploykit never runs it. "
                    "Fix: where you trust the file, save its tensors alone: "
                    "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pth'), "
                    "or model.state_dict() where it holds a whole model."
                ) from error
            raise WeightsError(
                f"{path} cannot be read as a torch file: {_what_is_wrong(path, error)}. Copy or download it again."
            ) from error
    if isinstance(content, (list, tuple)) and any(isinstance(item, Mapping) for item in content):
        content = {str(position): item for position, item in enumerate(content)}  # (state_dict, epoch)
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}; expected a state dict: names to tensors. "
            "Save model.state_dict()."
        )
    return CheckpointFile(path=path, content=content)


def _refused_globals(path: Path, error: Exception) -> list[str]:
    """Return the names of classes and functions in a file that are not allowed."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # an old format, or a damaged file: the error names the first one
        found = _REFUSED_GLOBAL.search(str(error))
        name = found[1].rstrip(".") if found else ""  # torch leaves out the module of a builtin
        return [name if "." in name else f"builtins.{name}"] if name else []


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Tell from its first bytes what is wrong with a file that does not read."""
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"version https://"):
        return "it is the pointer of Git LFS to the file; run `git lfs pull`"
    if start.lstrip().startswith(b"<"):
        return "it is a web page, and torch.save did not write it"
    named_safetensors = path.name.lower().endswith(SAFETENSORS)
    if start[:2] == b"PK":
        return "it is a zip archive; rename it to .pth" if named_safetensors else _wrong_archive(path, error)
    if named_safetensors:
        return "its header is damaged, or its end is missing"
    if start[8:9] == b"{":
        return "it looks like a safetensors file; rename it to .safetensors"
    return "it is damaged" if start[: len(_LEGACY_MAGIC)] == _LEGACY_MAGIC else "torch.save did not write it"


def _wrong_archive(path: Path, error: Exception) -> str:
    try:
        if not zipfile.is_zipfile(path):
            return "its end is missing"
        with zipfile.ZipFile(path) as archive:
            inside = [name.rpartition("/")[2] for name in archive.namelist()]
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return "its table of contents is damaged"
    if "data.pkl" not in inside:
        return "it is a zip archive that torch.save did not write"
    if _OTHER_PROTOCOL.search(str(error)):
        return "its pickle protocol is newer than torch reads without running code; save it with the default one"
    return "it is damaged inside"


def _is_shard(name: str) -> bool:
    return name == Path(name).name and "\\" not in name and is_checkpoint_name(name) and not name.endswith(INDEX)


def _read_shards(path: Path) -> CheckpointFile:
    """Return the tensors of an index and its shards, which lie beside it."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(key): str(shard) for key, shard in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not the index of a sharded checkpoint; expected JSON with a 'weight_map' from tensor to file. "
            "Copy or download it again."
        ) from error
    names = sorted(set(shards.values()))
    foreign = [name for name in names if not _is_shard(name)]
    if foreign or not names:
        raise WeightsError(f"{path} names the shards {foreign or names}; expected checkpoint files beside it.")
    if absent := [name for name in names if not (path.parent / name).is_file()]:
        raise WeightsError(f"{path} names {len(names)} shards, of which {absent} are not beside it. Copy them there.")
    content: dict[str, object] = {}
    metadata: dict[str, str] = {}
    for name in names:
        shard = read_checkpoint(path.parent / name)
        metadata |= shard.metadata
        own = {key for key, place in shards.items() if place == name}
        if missing := sorted(own - shard.content.keys()):
            raise WeightsError(f"{path} says that {name} holds {missing[:3]}, which it lacks. Copy the shards again.")
        content |= {key: shard.content[key] for key in own}
    return CheckpointFile(path=path, content=content, metadata=metadata)
