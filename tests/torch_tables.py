"""Tables that torch's exporter makes anew for each export, about two seconds of a small one, made once instead.

They depend on torch and onnxscript alone, not on what is exported: the graphs stay what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._C import DispatchKey
from torch._export import utils
from torch._ops import OperatorBase
from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter._registration import ONNXRegistry

IMPLICIT = "CompositeImplicitAutograd"


def keep_tables(patch: pytest.MonkeyPatch) -> None:
    """Keep the parsed ONNX operators, and the list of torch's operators until one is added."""
    parse, py_impl = functools.cache(ONNXRegistry.from_torchlib), OperatorBase.py_impl
    list_operators = utils._collect_all_valid_cia_ops
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

    def register(operator: OperatorBase, key: Any) -> Callable[[Any], Any]:
        """Do as torch does, without the type annotations that it evaluates 5,000 times an export."""
        if not isinstance(key, DispatchKey) or key == DispatchKey.Python or key in operator.py_kernels:
            return py_impl(operator, key)

        def put(kernel: Any) -> Any:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()
            return kernel

        return put

    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(registry))
    patch.setattr(OperatorBase, "py_impl", register)
    for module in (utils, decomp_utils, exported_program):
        patch.setattr(module, "_collect_all_valid_cia_ops", list_when_added)
