"""The shape of the code: who may name a runtime, who may import whom, and that nothing runs in a circle."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploykit.backends.table import BACKENDS

ROOT = Path(__file__).parent.parent
FOLDERS = {name: path.split(".")[2] for name, path in BACKENDS.items()}
"""The folder of each runtime of the table, by the runtime's name."""

NAMED = {name for name in (*FOLDERS, *FOLDERS.values()) if name != "torch"}
"""``torch`` is a library too, which most files import."""

NAMES_ANY_RUNTIME = {"deploykit/backends/table.py"}

EXECUTION_PROVIDERS = {
    ("deploykit/backends/onnxruntime/adapter.py", "tensorrt"): "an execution provider of ONNX Runtime",
    ("deploykit/backends/onnxruntime/package.py", "openvino"): "a build of ONNX Runtime with that provider",
}

PREFIXES = {"deploykit": "deploykit", "export": "deploykit.export", "calibration": "deploykit.calibration"}

LAYERS: tuple[tuple[str, ...], ...] = (
    ("printable", "unset", "privacy", "child_process", "interruption"),
    ("errors", "arrays", "processor", "feature_dict", "labels", "timing", "plain_files", "torchvision_operators"),
    (
        "arguments",
        "image_sizes",
        "precisions",
        "spec",
        "progress",
        "optional",
        "locks",
        "names",
        "sampling",
        "images",
        "threads",
    ),
    ("places", "npz", "cluster"),
    ("target",),
    ("options", "graph", "dataset"),
    ("parity",),
    ("store_entry", "store_folder", "store_upkeep", "store"),
    ("manifest", "bundle_files", "output_places"),
    ("bundle", "bundle_status", "cache", "trust", "signatures", "asked", "predict"),
    ("shipping",),
    ("runtime side",),
    ("loading",),
    ("onnx_session", "onnx_values"),
    ("backbones", "fusion"),
    ("calibration",),
    ("backends",),
    ("export",),
    ("jobs",),
    ("facade", "opening", "verification", "assertion", "qat"),
    ("several_targets",),
    ("accuracy", "bench", "bench_plot", "extraction", "tune", "serving"),
    ("changes", "sweep"),
    ("reports",),
    ("cli", "__main__"),
)
"""Every import goes to the same layer or to one above it in this list."""

ENTRY_POINTS = {"deploykit.parity.pytest_plugin"}
"""What another program starts: it stands above everything, as the commands do."""

RUNTIME_SIDE = re.compile(
    r"deploykit\.backends(\.(backend|table|runtime|input_checks|engine_file|onnx_external|onnx_header|protobuf|"
    r"run_queue|stream|tuning|fork_guard)|"
    r"(\.\w+){1,2}\.(backend|adapter|package|archive|session|targets|needs|api|protocols|cuda_\w+|build|builder|mil_program|"
    r"plan_file|context_file|portable|read_error|request_queue|thread_pool))?"
)
"""What opens an engine: it stands below everything that builds one, and imports neither torch nor onnx."""


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name, each file once."""
    found = {}
    for top, prefix in (
        ("deploykit", "deploykit"),
        ("export", "deploykit.export"),
        ("calibration", "deploykit.calibration"),
    ):
        for path in sorted((ROOT / top).rglob("*.py")):
            if any(parent.is_symlink() for parent in path.parents):
                continue
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path, *, at_import_time: bool) -> Iterator[str]:
    """The package's own modules that a file imports; ``at_import_time`` leaves out those inside functions."""
    tree = tree_of(path)
    for node in _walk(tree, into_functions=not at_import_time):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("deploykit"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("deploykit."))


def _walk(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not into_functions:
            continue
        yield child
        yield from _walk(child, into_functions=into_functions)


def layer_of(module: str) -> int:
    """The place of a module in `LAYERS`."""
    name = "runtime side" if RUNTIME_SIDE.fullmatch(module) else module.split(".")[1]
    name = "cli" if module in ENTRY_POINTS else name
    return next(place for place, names in enumerate(LAYERS) if name in names)


def strings_and_names(path: Path) -> Iterator[tuple[int, str]]:
    """Every string but docstrings, and every identifier, with its line."""
    tree = tree_of(path)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, " ".join([node.module or "", *(alias.name for alias in node.names)])


def test_only_its_own_folder_and_the_table_name_a_runtime():
    wrong = []
    for path in MODULES.values():
        relative = path.relative_to(ROOT).as_posix()
        if relative in NAMES_ANY_RUNTIME:
            continue
        own = relative.split("/")[2] if relative.startswith("deploykit/backends/") else ""
        for line, text in strings_and_names(path):
            for name in NAMED:
                folder = FOLDERS.get(name, name)
                if name in text.lower() and folder != own and (relative, name) not in EXECUTION_PROVIDERS:
                    wrong.append(f"{relative}:{line}: {name} in {text[:60]!r}")
    assert not wrong, "\n".join(wrong)


def test_the_check_of_names_sees_a_name(tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text('"""openvino in a docstring is prose."""\nif runtime == "openvino":\n    pass\n')
    assert [line for line, text in strings_and_names(file) if "openvino" in text] == [2]


def test_imports_point_one_way():
    wrong = []
    for name, path in MODULES.items():
        if name == "deploykit":
            continue
        for imported in imports_of(path, at_import_time=False):
            if imported in MODULES and imported != "deploykit" and layer_of(imported) > layer_of(name):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    graph = {name: set(imports_of(path, at_import_time=True)) & MODULES.keys() for name, path in MODULES.items()}
    state: dict[str, str] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        state[name] = "open"
        for imported in sorted(graph[name] - {"deploykit"}):
            if state.get(imported) == "open":
                pytest.fail(" -> ".join((*trail, name, imported)))
            if imported not in state:
                visit(imported, (*trail, name))
        state[name] = "done"

    for name in graph:
        if name not in state:
            visit(name, ())


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith(".adapter") and ".torch." not in name])
def test_an_adapter_imports_neither_torch_nor_onnx(name: str):
    seen, queue = set(), [name]
    while queue:
        module = queue.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        tree = tree_of(MODULES[module])
        for node in _walk(tree, into_functions=False):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {each.split(".")[0] for each in names} & {"torch", "onnx", "onnx_ir", "onnxscript"}
            assert not heavy, f"{module}, which {name} imports, imports {heavy}"
        queue += imports_of(MODULES[module], at_import_time=True)
