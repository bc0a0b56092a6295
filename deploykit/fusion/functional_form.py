"""x.add_(y) -> x + y: a traced program that writes nothing in place and has no regions, for the passes that follow."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from deploykit.errors import ExportError
from deploykit.fusion.drop_identities import drop_in_place, mutates
from deploykit.fusion.program import export_program
from deploykit.fusion.quiet import quiet_torch
from deploykit.spec import InputSpec

_aten = torch.ops.aten
_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def functional_form(program: torch.export.ExportedProgram, spec: InputSpec) -> torch.export.ExportedProgram:
    """Bring a traced program into functional form; one that is so already is returned as it is.

    What it wrote into its input or its buffers is dropped: the outputs of one call do not depend on it.

    Raises:
        ExportError: a region of autocast changes what the program computes on the CPU.
    """
    drop_in_place(program.graph)
    program.graph_module.recompile()
    regions = any(node.target in (_GRADIENTS, _AUTOCAST) for node in program.graph.nodes)
    if not regions and not any(mutates(node) for node in program.graph.nodes):
        return program
    if regions:
        program = _without_regions(program, spec)
    with quiet_torch():
        module: GraphModule = program.run_decompositions({}).module()
    for node in list(module.graph.nodes):
        if node.target == _aten.copy_.default and not node.users:
            module.graph.erase_node(node)
        elif node.target == _aten._native_batch_norm_legit_no_training.default:
            _restore_batch_norm(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return export_program(module, spec)


def _restore_batch_norm(node: Node) -> None:
    """Write the operator back that the passes know, in the place of its decomposed form."""
    (first,) = [user for user in node.users if user.target is operator.getitem]
    source, weight, bias, mean, variance, momentum, epsilon = node.args
    with node.graph.inserting_before(node):
        arguments = (source, weight, bias, mean, variance, False, momentum, epsilon, False)
        plain = node.graph.call_function(_aten.batch_norm.default, arguments)
    plain.meta = {**first.meta}
    first.replace_all_uses_with(plain)


def _without_regions(program: torch.export.ExportedProgram, spec: InputSpec) -> torch.export.ExportedProgram:
    """Put the content of ``torch.no_grad``, ``enable_grad`` and idle ``autocast`` in the place of the region."""
    module: GraphModule = program.module()
    pending = True
    while pending:
        pending = False
        for node in list(module.graph.nodes):
            if node.target in (_GRADIENTS, _AUTOCAST):
                _inline(module, node)
                pending = True  # what it held may hold a region
    module.graph.eliminate_dead_code()
    module.recompile()
    return export_program(module, spec)


def _inline(module: GraphModule, node: Node) -> None:
    if node.target == _AUTOCAST and node.args[0] == "cpu" and node.args[2]:
        raise ExportError(
            f"the network computes in {node.args[1]} within its own autocast region; expected one that computes in "
            "float32. Fix: leave torch.autocast out of its forward, and ask for precision='bf16' or 'fp16'."
        )
    position = 4 if node.target == _AUTOCAST else 1
    holder, operands = node.args[position], node.args[position + 1 :]
    assert isinstance(holder, Node)  # noqa: S101  (the subgraph is an attribute; narrows the type)
    part: GraphModule = getattr(module, str(holder.target))
    for owned in [each for each in part.graph.nodes if each.op == "get_attr"]:
        setattr(module, str(owned.target), getattr(part, str(owned.target)))
    values: dict[Node, Any] = dict(zip(part.graph.find_nodes(op="placeholder"), operands, strict=True))
    with module.graph.inserting_before(node):
        results: Any = module.graph.graph_copy(part.graph, values)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
