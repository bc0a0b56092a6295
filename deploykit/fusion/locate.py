"""Say where in a user's module something went wrong."""

from __future__ import annotations

import linecache
import re
import traceback
import types
from pathlib import PurePath

import torch
from torch import nn
from torch.fx import Node

import deploykit

_OWN = ("backbone", "module")
"""What stands around a user's module while it is traced: `Everything` and `ModuleBackbone`, outermost first."""

_LIBRARIES = tuple(f"{PurePath(str(package.__file__)).parent}/" for package in (torch, deploykit))
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \w+\n\s*(?P<code>.*)')


def describe_node(node: Node) -> str:
    """Return ``aten.dropout at 'layer1.drop' (Noise), net.py:12: y = F.dropout(x)``, as far as it is known."""
    return f"{operator_name(node)} {_where(node)}"


def operator_name(node: Node) -> str:
    """Return the name of the operator that a node calls, such as ``aten.dropout``."""
    return str(node.target).removesuffix(".default") if node.op == "call_function" else str(node.target)


def module_path(path: str) -> str:
    """Return a path below the traced module, as the user's module knows it; empty for that module itself."""
    for owner in _OWN:
        path = "" if path == owner else path.removeprefix(f"{owner}.")
    return path


def module_of(node: Node) -> str | None:
    """Return the path of the module that a node was traced in, as the user's module knows it; None for its own."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return module_path(str(stack[-1][0])) or None if stack else None


def describe_error(error: BaseException, root: nn.Module) -> str | None:
    """Return where in the user's code an error was raised: ``in 'layer1.act' (Act), net.py:6: if x.sum() > 0``.

    None where no frame of its traceback is the user's.
    """
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    if not frames:
        return None
    frame, line = frames[-1]
    file = frame.f_code.co_filename
    code = linecache.getline(file, line).strip().rstrip(":")
    paths = {id(part): path for path, part in root.named_modules()}
    owners = [each.f_locals.get("self") for each, _ in traceback.walk_tb(error.__traceback__)]
    inside = [owner for owner in owners if isinstance(owner, nn.Module) and id(owner) in paths]
    path = module_path(paths[id(inside[-1])]) if inside else ""
    place = f"in {path!r} ({type(inside[-1]).__name__}), " if path else "in "
    return f"{place}{PurePath(file).name}:{line}: {code}"


def _is_users(frame: types.FrameType) -> bool:
    """Return whether a frame runs neither torch's code nor deploykit's."""
    return not frame.f_code.co_filename.startswith((*_LIBRARIES, "<"))


def _where(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    inside = module_path(str(path))
    place = f"at {inside!r} ({str(kind).rpartition('.')[2]})" if inside else "in the module's own forward"
    trace = node.meta.get("stack_trace") or ""
    frames = [frame for frame in _FRAME.finditer(trace) if not frame["file"].startswith(_LIBRARIES)]
    if not frames:
        return place
    return f"{place}, {PurePath(frames[-1]['file']).name}:{frames[-1]['line']}: {frames[-1]['code'].strip()}"
