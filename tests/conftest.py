"""What all tests share: an engine cache of their own, photographs, and timm."""

from __future__ import annotations

import gc
import logging
import os
import random
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings

from deploykit.errors import MissingDependency
from deploykit.optional import require
from tests.photographs import write_photographs

# The same examples on every run, so that a submission is judged by its change; test-all searches anew.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory):
    """Engines that tests build go to a temporary folder, and never to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("engine-cache")
        patch.setenv("DEPLOYKIT_CACHE", str(folder))
        if "PYTEST_XDIST_WORKER" in os.environ:
            patch.setenv("DEPLOYKIT_TESTS_SHARED", str(tmp_path_factory.getbasetemp().parent / "shared"))
        yield folder


# torch's tables are millions of objects that live as long as the process: look through them seldom.
gc.set_threshold(100_000, 20, 100)
# torch writes a record of each step of an export for whoever listens, and pytest listens to everything.
logging.getLogger("torch.__trace").propagate = False


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Give a fixture the same random weights on every run, and others than the test that asks for it."""
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Give a test the same random weights on every run."""
    _seed(item.name)


def _seed(name: str) -> None:
    """Start the global generators, of what is installed, from a number of this name."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    with suppress(ImportError):
        import numpy as np

        np.random.seed(seed)
    with suppress(ImportError):
        import torch

        torch.manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def quick_exports():
    """Let torch's exporter prepare its tables of operators once a process: a test process exports hundreds of times."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError):
            from tests.torch_tables import keep_tables

            keep_tables(patch)
        yield


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of six small photographs; copy it before writing there."""
    pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def timm():
    """The module timm; skips by name where it is absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return require("timm")
        except MissingDependency as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def small_networks():
    """Let every test name the networks of `tests.small_resnet` and `tests.small_transformers`."""
    with suppress(ImportError):
        from deploykit.backbones.registry import register_backbone
        from tests.small_resnet import SmallResNet
        from tests.small_transformers import ShortConvNeXt, ShortVit

        for network in (SmallResNet, ShortVit, ShortConvNeXt):
            register_backbone(network)
