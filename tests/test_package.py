"""What the package promises as a whole: a light import, a complete wheel, imports that point one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import deploykit

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt_rtx", "PIL", "typer", "rich", "numpy")
ROOMS = {
    "errors": 0,
    "feature_dict": 0,
    "spec": 0,
    "npz": 0,
    "optional": 0,
    "processor": 0,
    "torchvision_operators": 0,
    "unset": 0,
    "graph": 1,
    "labels": 1,
    "runtimes": 1,
    "bundle": 1,
    "cache": 1,
    "parity": 1,
    "backbones": 2,
    "fusion": 2,
    "calibration": 3,
    "export": 4,
    "facade": 5,
    "cli": 6,
    "__main__": 7,
    "__init__": 7,
}
"""A room may import those of its own height and below."""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_deploykit_imports_nothing_heavy():
    loaded = run("import sys, deploykit; print(' '.join(sys.modules))").split()
    assert not set(HEAVY) & set(loaded)


def test_importing_deploykit_takes_under_150_ms():
    code = "from time import perf_counter as t; a = t(); import deploykit; print(t() - a)"
    assert min(float(run(code)) for _ in range(5)) < 0.150


def test_every_public_name_resolves():
    for name in deploykit.__all__:
        assert getattr(deploykit, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'create_backbon'"):
        _ = deploykit.create_backbon


def sources() -> list[tuple[str, Path]]:
    folders = {"": ROOT / "deploykit", "export": ROOT / "export", "calibration": ROOT / "calibration"}
    found = []
    for room, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if not room and inside.parts[0] in ("export", "calibration"):
                continue
            found.append((room or inside.parts[0].removesuffix(".py"), path))
    return found


class _TypesLeftOut(ast.NodeTransformer):
    """Drops what only a type checker imports."""

    def visit_If(self, node):
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def test_imports_point_one_way():
    wrong = []
    for room, path in sources():
        for node in ast.walk(_TypesLeftOut().visit(ast.parse(path.read_text()))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "deploykit" and len(parts) > 1 and ROOMS[parts[1]] > ROOMS[room]:
                    wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


def test_files_stay_readable():
    long = [str(path.relative_to(ROOT)) for _, path in sources() if len(path.read_text().splitlines()) > 450]
    assert not long


def test_no_path_of_a_machine_is_in_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("needs a git checkout")
    pattern = re.compile(r"(^|[\s\"'=(])/(home|root|work|opt|Users)/\w", re.MULTILINE)
    texts = (path for path in map(ROOT.joinpath, tracked) if path.is_file() and not path.is_symlink())
    found = [path.name for path in texts if pattern.search(path.read_text(errors="ignore"))]
    assert found in ([], [Path(__file__).name])


@pytest.mark.slow
def test_the_wheel_holds_both_linked_folders_once(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (
        "deploykit/export/pipeline.py",
        "deploykit/calibration/dialects/qdq.py",
        "deploykit/data/imagenet_labels.txt",
        "deploykit/py.typed",
    ):
        assert path in names
    assert not [name for name in names if name.startswith(("export/", "calibration/", "tests/", "benchmarks/"))]
