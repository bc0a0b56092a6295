"""The Kotlin example compiles against what it uses of Android and of LiteRT's Java API."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HOSTS = Path(__file__).parent.parent.parent / "examples" / "hosts"


@pytest.mark.slow
def test_the_android_example_compiles(tmp_path):
    kotlinc = shutil.which("kotlinc")
    if kotlinc is None:
        pytest.skip("kotlinc is not installed")
    sources = [HOSTS / "android" / "Features.kt", *sorted((Path(__file__).parent / "android_api").glob("*.kt"))]
    done = subprocess.run([kotlinc, *sources, "-d", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert (tmp_path / "deploykit" / "example" / "Backbone.class").is_file()
