"""Digest what a network computes beyond its state dict: two modules of one class may share every weight."""

from __future__ import annotations

import hashlib
import re

import torch
from torch.fx import GraphModule

from deploykit.backbones.base import BaseBackbone
from deploykit.export.trace import trace
from deploykit.spec import InputSpec

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_OWN_CODE = ("deploykit.", "timm.")


def network_digest(backbone: BaseBackbone, spec: InputSpec) -> str:
    """Return SHA-256 over the layers and their settings; for code of the user's own over its traced program too.

    Raises:
        SpecError, ExportError: a network of the user's own that cannot be exported; see `trace`.
    """
    digest = hashlib.sha256(_ADDRESS.sub("", repr(backbone)).encode())
    if not all(type(part).__module__.startswith((*_OWN_CODE, "torch.nn.")) for part in backbone.modules()):
        _add_program(digest, trace(backbone, spec))
    return digest.hexdigest()


def _add_program(digest: hashlib._Hash, program: torch.export.ExportedProgram) -> None:
    for part in program.graph_module.modules():
        if isinstance(part, GraphModule):
            digest.update(part.code.encode())
    for name, value in sorted({**program.state_dict, **program.constants}.items()):
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
