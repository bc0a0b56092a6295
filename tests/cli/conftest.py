"""The command called in this process, photographs, and two bundles that it exported once."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploykit.cli.main import main
from tests.small_resnet import SMALL

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIDE = "64"


@dataclass(frozen=True, kw_only=True)
class Called:
    code: int
    out: str
    err: str

    def json(self):
        return json.loads(self.out)


def call(*arguments) -> Called:
    """The command with these arguments: its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Called(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session", name="call")
def call_fixture():
    return call


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of four photographs."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOGRAPHS:
        Image.fromarray(np.asarray(getattr(data, name)())).save(folder / f"{name}.jpg")
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """An FP32 classifier of static batch 2 in ONNX Runtime."""
    folder = tmp_path_factory.mktemp("bundles") / "classifier"
    done = call("export", SMALL, "--runtime", "onnxruntime", "--image-size", SIDE, "--batch-size", "2", "-o", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def exported_features(tmp_path_factory, photos) -> tuple[Path, Called]:
    """An INT8 engine of two feature levels in ONNX Runtime, and what exporting it printed."""
    folder = tmp_path_factory.mktemp("bundles") / "features"
    done = call(
        *("export", SMALL, "--runtime", "onnxruntime", "--image-size", SIDE, "--precision", "int8"),
        *("--calibration", photos, "--calibrator", "minmax", "--features-only", "--output-indices", "2,3"),
        *("--batch-size", "1,2,4", "--min-sqnr-db", "20", "-o", folder, "--json"),
    )
    assert done.code == 0, done.err
    return folder, done


@pytest.fixture(scope="session")
def features(exported_features) -> Path:
    return exported_features[0]
