"""The plugin, in a pytest of its own, as a user starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent.parent
BUNDLE = ROOT / "tests" / "data" / "bundles-0.1.0" / "onnxruntime-int8"
# Not through the entry point, which an editable install of another day may lack.
PLUGIN = ("-p", "no:deploykit", "-p", "deploykit.parity.pytest_plugin", "-p", "no:cacheprovider")

OWN_TESTS = """
import numpy as np

def test_passes(parity):
    images = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    parity.assert_parity(lambda x: x * 2, lambda x: x * 2, images)

def test_fails(parity):
    images = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    parity(lambda x: x * 2.2, lambda x: x * 2, images, min_sqnr=40)
"""


def run_pytest(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", *PLUGIN, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "test_own.py").write_text(OWN_TESTS)
    shutil.copytree(BUNDLE, folder / "dist" / "good")
    damaged = shutil.copytree(BUNDLE, folder / "dist" / "damaged")
    (damaged / "model.onnx").write_bytes(b"something else")
    return folder


@pytest.fixture(scope="module")
def done(folder):
    bundles = ("--deploykit-bundle", "dist/good", "dist/damaged", "dist/absent")
    return run_pytest(folder, "test_own.py", "-rA", "--strict-markers", "--junitxml", "junit.xml", *bundles)


def outcomes(done) -> dict[str, str]:
    lines = (line.split() for line in done.stdout.splitlines() if line.startswith(("PASSED ", "FAILED ", "ERROR ")))
    return {words[1]: words[0] for words in lines}


def test_each_bundle_and_output_and_device_is_one_test(done):
    assert outcomes(done) == {
        "test_own.py::test_passes": "PASSED",
        "test_own.py::test_fails": "FAILED",
        "dist/good::whole": "PASSED",
        "dist/good::stem[auto]": "PASSED",
        "dist/good::stage1[auto]": "PASSED",
        "dist/damaged::whole": "FAILED",
        "dist/damaged::stem[auto]": "FAILED",
        "dist/damaged::stage1[auto]": "FAILED",
        "dist/absent::whole": "FAILED",
    }
    assert done.returncode == 1


def test_a_failure_is_the_table(done):
    assert "output: 20.0 dB; budget at least 40 dB" in done.stdout
    assert "│ output │    20.0 │" in done.stdout
    assert "BundleError: the bundle dist/damaged is damaged" in done.stdout


def test_the_figures_are_properties_of_the_junit_report(folder, done):
    cases = {case.get("name"): case for case in ElementTree.parse(folder / "junit.xml").iter("testcase")}  # noqa: S314
    found = {
        name: {each.get("name"): each.get("value") for each in case.iter("property")} for name, case in cases.items()
    }
    assert float(found["test_fails"]["output.sqnr_db"]) == pytest.approx(20.0)
    assert found["test_passes"]["output.sqnr_db"] == "300.0"


def test_the_marker_chooses_the_bundles_alone(folder):
    arguments = ("test_own.py", "-m", "deploykit", "--collect-only", "-q", "--deploykit-bundle", "dist/good")
    found = run_pytest(folder, *arguments, "--deploykit-device", "cpu", "gpu")
    names = ["stem[cpu]", "stage1[cpu]", "stem[gpu]", "stage1[gpu]"]
    assert found.stdout.split()[:5] == ["dist/good::whole", *(f"dist/good::{name}" for name in names)]
    assert "test_own" not in found.stdout


@pytest.mark.slow
def test_workers_of_xdist_share_the_tests(folder):
    found = run_pytest(folder, "test_own.py", "-rA", "-p", "xdist", "-n", "2", "--deploykit-bundle", "dist/good")
    assert len(outcomes(found)) == 5
    assert outcomes(found)["dist/good::stage1[auto]"] == "PASSED"


def test_nothing_is_imported_when_it_is_not_used(tmp_path):
    heavy = "{'numpy', 'msgspec', 'rich', 'typer', 'torch', 'onnxruntime', 'deploykit.facade'}"
    (tmp_path / "test_other.py").write_text(
        f"import sys\ndef test_other():\n    assert not {heavy} & set(sys.modules)\n"
        "    assert 'deploykit.parity.pytest_plugin' in sys.modules\n"
    )
    found = run_pytest(tmp_path, "-q")
    assert found.returncode == 0, found.stdout


def test_importing_the_plugin_is_fast():
    code = "import pytest\n"
    code += "from time import perf_counter as t\na = t()\nimport deploykit.parity.pytest_plugin\nprint(t() - a)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.1


def test_the_entry_point_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\ndeploykit = "deploykit.parity.pytest_plugin"\n' in text
