"""The pipeline's recipes run: the action's own steps, on a release and on a bundle that drifted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper

from deploykit.bundle import read_manifest, write_manifest

ROOT = Path(__file__).parent.parent
PIPELINE = ROOT / "examples" / "pipeline"
RELEASE = ROOT / "tests" / "data" / "bundles-0.1.0" / "onnxruntime-int8"
COMMAND = f"{sys.executable} -m deploykit"


def drifted(folder: Path, factor: float = 1.1) -> Path:
    """The release's bundle with one scale a tenth larger: still within its own budget."""
    shutil.copytree(RELEASE, folder)
    model = onnx.load(folder / "model.onnx")
    scales = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.input[1:2]}
    weights = [each for each in model.graph.initializer if each.name in scales and each.dims]
    weights[-1].CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weights[-1]) * np.float32(factor), weights[-1].name)
    )
    onnx.save(model, folder / "model.onnx")
    manifest = read_manifest(folder)
    for name in ("manifest.json", "manifest.sha256"):
        (folder / name).unlink()
    write_manifest(folder, manifest)
    return folder


def run_action(folder: Path, **inputs: str) -> tuple[int, str]:
    """Run the steps of the composite action as a runner does; whether one failed, and what they printed."""
    action = yaml.safe_load((PIPELINE / "action.yml").read_text())
    values = {name: declared.get("default", "") for name, declared in action["inputs"].items()} | inputs
    assert not set(inputs) - set(action["inputs"])
    failed, printed = 0, ""
    for step in action["runs"]["steps"]:
        condition = step.get("if", "")
        if (
            "run" not in step
            or ("install" in condition and not values["install"])
            or (failed and "always()" not in condition)
        ):
            continue
        given = {name: _filled(text, values) for name, text in step.get("env", {}).items()}
        own = {"GITHUB_ACTION_PATH": str(PIPELINE), "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
        environment = os.environ | own | given | {"DEPLOYKIT": COMMAND, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        failed = failed or done.returncode
        printed += done.stdout + done.stderr
    return failed, printed


def _filled(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], text)


@pytest.mark.slow
def test_a_bundle_like_the_release_passes_and_is_reported(tmp_path):
    shutil.copytree(RELEASE, tmp_path / "new bundle")
    code, printed = run_action(tmp_path, bundle="new bundle", release=str(RELEASE), reports="pages")
    assert code == 0, printed
    assert "parity: new bundle is within all tolerances" in printed
    assert {path.name for path in (tmp_path / "pages").iterdir()} == {
        "verify.json",
        "compare.json",
        "report.md",
        "report.html",
    }
    assert "# Parity of small" in (tmp_path / "summary.md").read_text()


def test_a_drift_fails_the_job_and_the_report_is_there(tmp_path):
    drifted(tmp_path / "new")
    code, printed = run_action(tmp_path, bundle="new", release=str(RELEASE), **{"report-options": "--no-run"})
    assert code == 1
    assert "new is OUTSIDE the tolerances" in printed
    found = json.loads((tmp_path / "parity-reports" / "compare.json").read_text())
    assert not found["passed"]
    assert [each.partition(":")[0] for each in found["comparison"]["failures"]]
    assert json.loads((tmp_path / "parity-reports" / "verify.json").read_text())["passed"], "the budget alone passes"
    assert (tmp_path / "summary.md").exists()


def test_bad_usage_is_told():
    done = subprocess.run([PIPELINE / "parity.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: parity.sh" in done.stderr


@pytest.mark.parametrize("name", ["action.yml", "gitlab-ci.yml"])
def test_no_input_is_pasted_into_a_script(name):
    """An input within a script could run anything: inputs come through the environment."""
    scripts = re.findall(
        r"^\s*(?:run|script): .*?(?=^\s*-|\Z)", (PIPELINE / name).read_text(), re.DOTALL | re.MULTILINE
    )
    assert not [script for script in scripts if "${{" in script.partition("env:")[0]]


@pytest.mark.slow
def test_the_gitlab_job_also_tests_a_bundle_that_drifted(tmp_path):
    job = yaml.safe_load((PIPELINE / "gitlab-ci.yml").read_text())["parity"]
    assert job["artifacts"]["when"] == "always"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    drifted(tmp_path / "new")
    own = {"DEPLOYKIT": COMMAND, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "REPORT_OPTIONS": "--no-run"}
    given = job["variables"] | {"BUNDLE": "new", "RELEASE": str(RELEASE), "EXPORT": "", "COMPARE_OPTIONS": ""}
    environment = os.environ | own | given | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = "\n".join(job["script"])
    done = subprocess.run(
        ["sh", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "new is OUTSIDE the tolerances" in done.stderr
    assert "<testcase" in (tmp_path / "parity-reports" / "junit.xml").read_text()
