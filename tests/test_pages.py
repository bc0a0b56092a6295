"""The pages of docs/ are complete: every page indexed, every error and command described, every figure in one place."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import deploykit
from deploykit import errors
from deploykit.backends import table
from deploykit.cli.main import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
README_LINES = 150
SECTION = re.compile(r"^## (?P<title>.+?)\n(?P<text>.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"`((?:deploykit|export|calibration|tests|benchmarks|examples|docs)/[\w./*-]*)`")
NAMES = {
    "EfficientNet-Lite0": "tf_efficientnet_lite0",
    "ResNet-50": "resnet50",
    "MobileNetV2": "mobilenetv2_100",
    "MobileNetV3-L": "mobilenetv3_large_100",
    "RegNetY-008": "regnety_008",
    "ViT-S/16": "vit_small_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "ConvNeXt-T": "convnext_tiny",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sections(page: str) -> dict[str, str]:
    return {match["title"]: match["text"] for match in SECTION.finditer(read(page))}


def raised_classes() -> list[str]:
    """The errors and warnings that deploykit defines."""
    found = inspect.getmembers(errors, inspect.isclass)
    return [name for name, cls in found if cls.__module__ == errors.__name__ and issubclass(cls, Exception)]


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md") if path.name != "index.md"))
def test_every_page_is_in_the_index(page):
    assert f"]({page})" in read("docs/index.md")


@pytest.mark.parametrize("name", raised_classes())
def test_every_error_has_its_cause_and_its_cure(name):
    text = sections("docs/troubleshooting.md").get(name, "")
    assert text, f"docs/troubleshooting.md has no section {name}"
    assert re.search(r"^\| you see \| cause \| cure \|$", text, re.MULTILINE) or "Cure:" in text, name


def test_troubleshooting_describes_no_error_that_is_gone():
    assert set(sections("docs/troubleshooting.md")) == set(raised_classes())


def test_every_command_has_a_row():
    commands = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"^\| `deploykit ([\w-]+)", read("docs/commands.md"), re.MULTILINE)) == commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_places_in_the_repository_that_a_page_names_are_there(page):
    for place in PLACE.findall(page.read_text(encoding="utf-8")):
        if "NAME" not in place:
            assert list(ROOT.glob(place.rstrip("/"))), f"{page.name} names {place}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_modules_and_names_that_a_page_writes_out_are_there(page):
    for dotted in set(re.findall(r"`(deploykit(?:\.\w+)+)`", page.read_text(encoding="utf-8"))):
        assert dotted == table.ENTRY_POINTS or resolves(dotted), f"{page.name} names {dotted}"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    owner, _, name = dotted.rpartition(".")
    try:
        if importlib.util.find_spec(dotted):
            return True
    except ModuleNotFoundError:  # the owner is a module and no package
        pass
    return hasattr(importlib.import_module(owner), name)


def measured() -> dict[tuple[str, str], list[str]]:
    """The figures of INT8, by network and runtime, of the table of the peers in docs/benchmarks.md."""
    rows = re.findall(
        r"^(\w+|geometric mean) +int8 +(onnxruntime|openvino) +(.+)$", read("docs/benchmarks.md"), re.MULTILINE
    )
    return {(network, runtime): figures.split() for network, runtime, figures in rows}


def test_the_readmes_figures_are_those_of_the_benchmarks_page():
    table, rows = measured(), {}
    for line in read("README.md").splitlines():
        if "times" in line and line.startswith("|"):
            network, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[network.partition(" (")[0]] = [re.findall(r"[\d.]+|none", cell) for cell in cells]
    assert rows.pop("geometric mean")[:2] == [
        [table["geometric mean", runtime][column] for runtime in ("onnxruntime", "openvino")] for column in (0, 1)
    ]
    assert rows.keys() == NAMES.keys()
    for name, (speed, time, *logits) in rows.items():
        for place, runtime in enumerate(("onnxruntime", "openvino")):
            ratio, _, _, against, ours, _, best, *_ = table[NAMES[name], runtime]
            assert (speed[place], time[place]) == (ratio, against), name
            assert logits[place] == ["none" if best == "-" else best, ours], name


@pytest.mark.slow
def test_the_reference_is_made_and_describes_every_public_name(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed")
    makefile = read("Makefile").replace("\\\n", " ")
    modules = re.search(r"^REFERENCE := (.*)$", makefile, re.MULTILINE)[1].split()
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--no-show-source"]
    done = subprocess.run(
        [*command, "--output-directory", str(tmp_path), *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "deploykit.html").read_text(encoding="utf-8")
    assert [name for name in deploykit.__all__ if name != "__version__" and f'id="{name}"' not in page] == []
    for module in modules[1:]:
        assert (tmp_path / f"{module.replace('.', '/')}.html").stat().st_size > 1000, module
