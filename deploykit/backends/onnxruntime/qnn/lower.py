"""ONNX graph -> ``model.onnx`` with a QNN context binary for one SoC, every node in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.build_process import run_build
from deploykit.backends.onnx_file import write_onnx
from deploykit.backends.onnxruntime.package import load_onnxruntime
from deploykit.backends.onnxruntime.qnn.compiler import COMPILED, REASON, REFUSED, SOURCE, TRACE
from deploykit.backends.onnxruntime.qnn.context_file import CONTEXT, DOMAIN
from deploykit.backends.onnxruntime.qnn.package import PLUGIN, load_plugin, machine_tie
from deploykit.backends.onnxruntime.qnn.socs import soc_of
from deploykit.errors import ExportError
from deploykit.graph import OnnxGraph
from deploykit.optional import installed_version, require
from deploykit.places import scratch_folder

if TYPE_CHECKING:
    import onnx

ENGINE = "model.onnx"
_NAMED = 8
_LOG_ERROR = re.compile(r"\[E:onnxruntime:[^\]]*\] (.+?)(?:\x1b\[m)?$", re.MULTILINE)


def lower(graph: OnnxGraph, folder: Path, options: LowerOptions) -> Engine:
    """Compile the graph for the SoC of ``options.settings`` in a process of its own and write ``model.onnx``.

    Args:
        graph: in FP16 or INT8, of one batch size.
        folder: where the engine goes.
        options: ``settings`` has ``soc_model``, Qualcomm's number of the SoC, and ``htp_arch``, the version of its NPU.

    Raises:
        SpecError: no SoC is given, or no number, or the two are not of one SoC.
        ExportError: QNN does not take a node, named with the reason, or its compiler failed.
        MissingDependency: onnxruntime-qnn is not installed.
    """
    soc = soc_of(options.settings)
    version, plugin = str(load_onnxruntime().__version__), load_plugin()
    with scratch_folder("qnn") as scratch:
        write_onnx(graph.model, scratch / SOURCE)
        _compile(scratch, **soc)
        operators = _operators(scratch / TRACE)
        write_onnx(_plain(scratch), folder / ENGINE)
    return Engine(
        file=ENGINE,
        runtime_version=version,
        requires=soc | machine_tie(),
        tools={"onnx": installed_version("onnx") or "unknown", PLUGIN.module: plugin.__version__},
        compiler={"qnn_operators": operators},
    )


def _compile(folder: Path, soc_model: str, htp_arch: str) -> None:
    """Run the compiler in the folder of its source.

    Raises:
        ExportError: it refused the graph, crashed, or took too long.
    """
    module = "deploykit.backends.onnxruntime.qnn.compiler"
    done = run_build("compilation for QNN", module, soc_model, htp_arch, answers=(REFUSED,), folder=folder)
    if done.returncode == REFUSED:
        raise _refusal(folder, f"SoC {soc_model}, HTP v{htp_arch}", done.stderr)


def _refusal(folder: Path, target: str, log: str) -> ExportError:
    """Return the error of a graph that was refused, with the nodes that QNN does not take, or what its log says."""
    nodes = _unsupported(folder / TRACE)
    if not nodes:
        said = [*_LOG_ERROR.findall(log), (folder / REASON).read_text(encoding="utf-8")]
        lines = "".join(f"\n  {' '.join(line.split())[:300]}" for line in dict.fromkeys(said))
        return ExportError(f"QNN does not compile the graph for {target}. Export for another target. It says:{lines}")
    lines = "".join(f"\n  {node['op_type']} {node['node_name']!r}: {_reason(node)}" for node in nodes[:_NAMED])
    more = f"\n  and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return ExportError(
        f"QNN does not take {len(nodes)} of the graph's nodes for {target}, and none is left to the CPU:{lines}{more}\n"
        "Write that part of the network in other operators, or export for another runtime or target."
    )


def _unsupported(trace: Path) -> list[dict[str, Any]]:
    """Return the nodes that QNN does not take, as its trace tells them; none where there is no trace."""
    nodes = _trace(trace).get("unsupported_nodes", ())
    return [node for node in nodes if node.get("op_type") and node.get("node_name")]


def _operators(trace: Path) -> str:
    """Count the QNN operators of an engine by type, as its trace tells them: ``Conv2d 20, ElementWiseAdd 8``."""
    graphs = _trace(trace).get("subgraph_traces", ())
    found = Counter(str(each.get("dst_qnn_op_type")) for graph in graphs for each in graph.get("op_mappings", ()))
    return ", ".join(f"{operator} {count}" for operator, count in sorted(found.items()))


def _trace(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return {}
    return told


def _reason(node: Mapping[str, Any]) -> str:
    return " ".join(str(node.get("reason") or "no reason given").split())[:200]


def _plain(folder: Path) -> onnx.ModelProto:
    """Return the context's model as runtimes on devices read it, once it is proved to be of QNN alone.

    ONNX Runtime writes the newest IR version and every opset that it knows, which older ones refuse.

    Raises:
        ExportError: a node is no QNN context.
    """
    package = require("onnx")
    source: onnx.ModelProto = package.load(folder / SOURCE, load_external_data=False)
    context: onnx.ModelProto = package.load(folder / COMPILED)
    others = [node.op_type for node in context.graph.node if (node.domain, node.op_type) != (DOMAIN, CONTEXT)]
    if others or not context.graph.node:
        raise ExportError(
            f"QNN left {', '.join(sorted(set(others))) or 'all'} of the graph to the CPU. Export for another runtime."
        )
    context.ir_version = source.ir_version
    del context.opset_import[:]
    opset = next(each.version for each in source.opset_import if each.domain in ("", "ai.onnx"))
    context.opset_import.extend([package.helper.make_opsetid("", opset), package.helper.make_opsetid(DOMAIN, 1)])
    return context
