"""``deploykit export --target``: several devices at once, and one that is not here."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from deploykit.bundle import read_manifest
from tests.small_resnet import SMALL

BOARD = """
title = "{title}"
machine = "{machine}"
instructions = []
processor = "{processor}"
precision = "fp32"
[[runtime]]
name = "onnxruntime"
"""


@pytest.fixture(scope="module")
def boards(tmp_path_factory):
    """Two targets: this machine, and one of another architecture."""
    folder = tmp_path_factory.mktemp("boards")
    here = platform.machine()
    other = "aarch64" if here == "x86_64" else "x86_64"
    for name, machine in (("here", here), ("elsewhere", other)):
        processor = "x86-vnni" if machine == "x86_64" else "arm64"
        text = BOARD.format(title=f"A board {name}", machine=machine, processor=processor)
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_each_target_of_several_is_a_row_with_its_worst_level_and_its_bundle(
    call, boards, tmp_path, monkeypatch, flags
):
    monkeypatch.chdir(tmp_path)  # a long path would be cut into two lines
    words = ("--target", boards / "here.toml", "--target", boards / "elsewhere.toml")
    done = call("export", SMALL, "--image-size", "64", *words, *flags, "-o", "out")
    assert done.code == 0, done.err
    status = {name: read_manifest(Path("out", name)).status for name in ("here", "elsewhere")}
    assert status == {"here": "parity_checked", "elsewhere": "built"}
    if flags:
        assert {name: told["status"] for name, told in done.json()["targets"].items()} == status
        return
    for name, reached in status.items():
        (row,) = [line for line in done.out.splitlines() if line.startswith(f"│ {name} ")]
        assert "(" in row, "the worst level stands behind its figure"
        assert reached in row
        assert f" out/{name} " in row
    assert done.out.splitlines()[-1].endswith("run there: deploykit verify BUNDLE --record")


def test_an_engine_for_another_machine_says_why_its_status_is_built(call, boards, tmp_path):
    words = ("--target", boards / "elsewhere.toml", "-o", tmp_path / "out")
    done = call("export", SMALL, "--image-size", "64", *words)
    assert done.code == 0, done.err
    assert "It is for A board elsewhere, and was compared here, on another machine. Copy it to its device" in done.out
