"""Name the tensors that a module returns, however it nests them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deploykit.backbones.base import FLOATS
from deploykit.errors import SpecError

_MAX_NAME = 200


def named_outputs(raw: object) -> dict[str, Any]:
    """Flatten what a module returned to leaves by name; an absent one (None) is left out.

    A name is the path to the leaf, joined by dots: keys of a mapping, fields of a dataclass or a named
    tuple, positions in a list or tuple; ``"0"`` for a tensor that is returned by itself.

    Raises:
        SpecError: two leaves have one name, or a key is empty.
    """
    outputs: dict[str, object] = {}
    for path, leaf in _leaves(raw, ()):
        name = ".".join(path) or "0"
        if "" in path:
            raise SpecError(
                f"the module returns a value under an empty key (its path is {path}); expected a name for every "
                "output. Fix: give it one."
            )
        if name in outputs:
            raise SpecError(
                f"the module returns two outputs whose name is {name!r}; expected a name of its own for each. "
                "Fix: rename one of them."
            )
        outputs[name] = leaf
    return outputs


def is_positional(name: str) -> bool:
    """Return whether a name is made of positions alone, as in lists and tuples."""
    return all(part.isdecimal() for part in name.split("."))


def check_outputs(outputs: Mapping[str, object], module: str, shape: tuple[int, ...]) -> None:
    """Refuse outputs that are neither one ``(N, D)`` tensor nor ``(N, C, H, W)`` maps.

    Args:
        outputs: from `named_outputs`.
        module: what to call the module in the message.
        shape: of the images that gave the outputs.

    Raises:
        SpecError: names the outputs at fault and says what they are.
    """
    if not outputs:
        raise SpecError(
            f"{module} gives nothing for images {shape}; expected one (N, D) tensor, or one or more (N, C, H, W) maps. "
            "Fix: return them from forward."
        )
    for name in outputs:
        _check_name(name, module)
    tensors = [output for output in outputs.values() if isinstance(output, Tensor)]
    alone = len(outputs) == 1 and all(output.dim() == 2 for output in tensors)
    wrong = {name: _problem(output, shape[0], 2 if alone else 4) for name, output in outputs.items()}
    if any(wrong.values()):
        found = ", ".join(f"{name!r} {_describe(output)}" for name, output in outputs.items())
        reasons = "; ".join(f"{name!r} {problem}" for name, problem in wrong.items() if problem)
        raise SpecError(
            f"{module} gives {found} for images {shape}; expected one (N, D) tensor, or one or more (N, C, H, W) maps: "
            f"{reasons}. Fix: wrap it in a module that returns only those."
        )


def check_follows_batch(outputs: Mapping[str, Tensor], module: str, batch: int) -> None:
    """Refuse an output that stays the same size when the batch grows: a constant, or the first image's alone.

    Raises:
        SpecError: names the output.
    """
    for name, output in outputs.items():
        if output.shape[:1] != (batch,):
            raise SpecError(
                f"output {name!r} of {module} has shape {tuple(output.shape)} for {batch} images; expected "
                f"({batch}, ...): it is a constant, or of one image alone. Fix: leave it out, or compute one for each."
            )


def _leaves(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    children = _children(value)
    if children is None:
        yield path, value
        return
    for key, child in children:
        if child is not None:
            yield from _leaves(child, (*path, key))


def _children(value: object) -> list[tuple[str, object]] | None:
    """Return the parts of a container by name; None for a leaf."""
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return [(str(position), child) for position, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _check_name(name: str, module: str) -> None:
    if len(name) > _MAX_NAME or not name.isprintable() or name != name.strip():
        raise SpecError(
            f"{module} names an output {name[:_MAX_NAME]!r} ({len(name)} characters); expected at most {_MAX_NAME} "
            "printable characters, with no blank at either end. Fix: rename it."
        )


def _problem(output: object, batch: int, rank: int) -> str | None:
    """Return what is wrong with an output; None for a float tensor of this batch and rank."""
    if not isinstance(output, Tensor):
        return "is no tensor"
    if output.layout != torch.strided:
        return f"is a {str(output.layout).removeprefix('torch.')} tensor"
    if output.dtype not in FLOATS:
        return f"holds {str(output.dtype).removeprefix('torch.')} and not floating-point numbers"
    if output.dim() != rank:
        return f"has {output.dim()} dimensions"
    if output.shape[0] != batch:
        return f"has a first dimension of {output.shape[0]}, and not of the {batch} images"
    return "is empty" if output.numel() == 0 else None


def _describe(output: object) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
