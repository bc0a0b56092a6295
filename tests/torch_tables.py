"""Tables that torch's exporter makes anew for each export, about two seconds of a small one, made once instead.

They depend on torch and onnxscript alone, not on what is exported: the graphs stay what they are.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch._export import utils
from torch._ops import OperatorBase
from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter._registration import ONNXRegistry

IMPLICIT = "CompositeImplicitAutograd"


def keep_tables(patch: pytest.MonkeyPatch) -> None:
    """Keep the parsed ONNX operators, and the list of torch's operators until one is added."""
    parse, list_operators = functools.cache(ONNXRegistry.from_torchlib), utils._collect_all_valid_cia_ops
    listed: dict[frozenset[str], set[OperatorBase]] = {}

    def registry(**opset: int) -> ONNXRegistry:
        kept, copy = parse(**opset), ONNXRegistry()
        copy._opset_version = kept.opset_version
        copy.functions = {target: list(functions) for target, functions in kept.functions.items()}
        return copy

    def list_when_added() -> set[OperatorBase]:
        registered = frozenset(torch._C._dispatch_get_registrations_for_dispatch_key(IMPLICIT))
        if registered not in listed:
            listed[registered] = list_operators()
        return listed[registered]

    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(registry))
    for module in (utils, decomp_utils, exported_program):
        patch.setattr(module, "_collect_all_valid_cia_ops", list_when_added)
