"""What the package promises as a whole: a light import, a complete wheel, files of a readable length."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import deploykit

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt_rtx", "PIL", "typer", "rich", "numpy")


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


def sources() -> list[Path]:
    linked = ROOT / "deploykit" / "export", ROOT / "deploykit" / "calibration"
    folders = (ROOT / "deploykit", ROOT / "export", ROOT / "calibration")
    paths = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    return [path for path in paths if not any(path.is_relative_to(link) for link in linked)]


def test_files_stay_readable():
    long = [str(path.relative_to(ROOT)) for path in sources() if len(path.read_text().splitlines()) > 450]
    assert not long


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("needs a git checkout")
    return listed


def test_no_file_that_a_tool_left_is_in_the_repository():
    paths = [ROOT / name for name in tracked_files()]
    assert [path.name for path in paths if path.is_file() and path.stat().st_size > 2_000_000] == []
    assert [path.name for path in paths if path.parent == ROOT and path.suffix in (".data", ".onnx", ".log")] == []


def test_no_path_of_a_machine_is_in_the_repository():
    tracked = tracked_files()
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
        "deploykit/calibration/quantize_weights.py",
        "deploykit/backends/onnxruntime/passes.py",
        "deploykit/data/imagenet_labels.txt",
        "deploykit/py.typed",
        "deploykit/export/targets/raspberry-pi-5.toml",
    ):
        assert path in names
    assert not [name for name in names if name.startswith(("export/", "calibration/", "tests/", "benchmarks/"))]
