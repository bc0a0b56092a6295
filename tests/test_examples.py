"""Every script of examples/ runs as its docstring says, and prints figures that hold."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.small_resnet import SMALL

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
RUN_BELOW = {"export_int8.py", "predict.py", "feature_pyramid.py", "compare_runtimes.py", "custom_module.py"}


def script(name: str) -> ModuleType:
    """The script as a module, so that runs share one process with torch in it."""
    spec = importlib.util.spec_from_file_location(f"examples_{Path(name).stem}", EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, photographs) -> dict[str, tuple[Path, str]]:
    """The bundle that export_int8.py wrote for each runtime, and what it printed."""
    made = {}
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path_factory.mktemp("examples") / f"{runtime}-int8"
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
            torch.manual_seed(0)  # both runtimes get the same weights
            lines: list[str] = []
            module = script("export_int8.py")
            patch.setattr(module, "print", lambda *words, into=lines: into.append(" ".join(map(str, words))), False)
            asked = ["--backbone", SMALL, "--image-size", "64", "--runtime", runtime, "--min-sqnr-db", "15"]
            module.main([str(photographs), *asked, "--output", str(folder)])
        made[runtime] = (folder, "\n".join(lines))
    return made


def test_every_script_is_run_here_and_listed_in_the_readme():
    assert set(SCRIPTS) == RUN_BELOW
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == SCRIPTS


@pytest.mark.parametrize("runtime", [pytest.param("onnxruntime", marks=pytest.mark.slow), "openvino"])
def test_export_int8_prints_the_stages_and_every_level(bundles, runtime):
    folder, printed = bundles[runtime]
    assert "... trace\n" in printed and "... bundle\n" in printed
    figures = dict(re.findall(r"^(\w+) +([\d.]+) dB", printed, re.MULTILINE))
    assert list(figures) == ["stem", "stage1", "stage2", "stage3", "stage4", "logits"]
    assert all(float(figure) >= 15 for figure in figures.values())
    assert printed.endswith(f"{folder}: parity_checked")


def test_predict_prints_the_best_classes_of_each_image(bundles, photographs, capsys):
    files = [str(photographs / "chelsea.jpg"), str(photographs / "coffee.jpg")]
    script("predict.py").main([str(bundles["onnxruntime"][0]), *files, "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["chelsea.jpg"] * 2 + ["coffee.jpg"] * 2
    first, second = (float(re.search(r"([\d.]+)%", line)[1]) for line in lines[:2])
    assert first >= second > 0


def test_predict_imports_no_torch(bundles, photographs):
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
    )
    arguments = [EXAMPLES / "predict.py", bundles["onnxruntime"][0], photographs / "coffee.jpg"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("coffee.jpg") == 3


def test_compare_runtimes_prints_how_far_two_bundles_are_apart(bundles, photographs, capsys):
    folders = [str(folder) for folder, _ in bundles.values()]
    script("compare_runtimes.py").main([*folders, str(photographs)])
    printed = capsys.readouterr().out
    assert "different weights" not in printed
    figures = re.findall(r"^(\w+)\.jpg: output ([\d.]+) dB$", printed, re.MULTILINE)
    assert [name for name, _ in figures] == sorted(path.stem for path in photographs.iterdir())
    assert all(10 < float(figure) < 80 for _, figure in figures)


def test_feature_pyramid_runs_as_one_engine(capsys):
    script("feature_pyramid.py").main(["--image-size", "64", "--channels", "16"])
    printed = capsys.readouterr().out
    assert re.findall(r"^(p\d): stride (\d+), \(1, 16, (\d), \d\)", printed, re.MULTILINE) == [
        ("p3", "8", "8"),
        ("p4", "16", "4"),
        ("p5", "32", "2"),
    ]
    assert all(float(figure) < 1e-3 for figure in re.findall(r"torch ([\d.e+-]+)", printed))


def test_custom_module_keeps_its_names_and_its_numbers(tmp_path, capsys):
    script("custom_module.py").main(["--output", str(tmp_path / "own")])
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+): stride (\d)", printed, re.MULTILINE) == [("fine", "4"), ("coarse", "8")]
    assert all(float(figure) < 1e-4 for figure in re.findall(r"torch ([\d.e+-]+)", printed))
    assert "parity_checked, BatchNorms folded: 2" in printed
