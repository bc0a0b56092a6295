"""Builds of one module under several names: the module's own version counts, and none is put over another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploykit.errors import DeployKitError, MissingDependency
from deploykit.optional import OptionalPackage, installed_version, require

NAMES = ("engine-gpu", "engine-nightly")
PACKAGE = OptionalPackage(
    module="some_engine", distribution="some-engine", extra="engine", feature="the engine", distributions=NAMES
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch):
    """A folder that packages are installed into by hand."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(
        distribution: str | None, version: str, *, module: str | None = "", needs: tuple[str, ...] = ()
    ) -> None:
        if module is not None:
            folder = tmp_path / "some_engine"
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").write_text(module)
        if distribution is not None:
            info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            lines = "".join(f"Requires-Dist: {need}\n" for need in needs)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{lines}")

    yield install
    sys.modules.pop("some_engine", None)


@pytest.mark.parametrize("name", ["some-engine", *NAMES])
def test_every_build_has_a_version(name, site):
    site(name, "1.32.0", module='__version__ = "1.32.0"\n')
    assert installed_version("some_engine", PACKAGE) == "1.32.0"
    assert installed_version("some_engine") == "1.32.0"  # nobody told its other names
    assert PACKAGE.build == name


@pytest.mark.parametrize("name", NAMES)
def test_the_distribution_says_the_version_where_the_module_does_not(name, site):
    site(name, "2026.5.0.dev1")
    assert installed_version("some_engine", PACKAGE) == "2026.5.0.dev1"


def test_the_modules_own_version_counts(site):
    """What `pip install` of one build over another leaves: the older record, and the newer files."""
    site("some-engine", "1.23.0", module='__version__: str = "1.32.0"\n')
    site("engine-gpu", "1.32.0", module=None)
    assert installed_version("some_engine", PACKAGE) == "1.32.0"
    assert PACKAGE.installed_builds() == ("engine-gpu", "some-engine")


def test_a_longer_form_of_the_same_version_is_told_as_pip_does(site, monkeypatch):
    site("some-engine", "2026.4.1", module='__version__ = "2026.4.1-22051-release"\n')
    assert installed_version("some_engine", PACKAGE) == "2026.4.1"


def test_no_distribution_is_needed(site):
    site(None, "", module='__version__ = "3.1"\n')
    assert installed_version("some_engine", PACKAGE) == "3.1"
    assert PACKAGE.build == "some-engine"


def test_an_absent_package_has_no_version_and_the_usual_command(site):
    assert installed_version("some_engine", PACKAGE) is None
    with pytest.raises(MissingDependency, match=r"Install it: pip install some-engine$"):
        require("some_engine", PACKAGE)


def test_a_build_whose_files_are_gone_is_installed_again_and_no_other(site):
    """What `pip uninstall` of one of two builds leaves."""
    site("engine-gpu", "1.32.0", module=None)
    with pytest.raises(DeployKitError, match="Reinstall it: pip install --force-reinstall engine-gpu") as caught:
        require("some_engine", PACKAGE)
    assert not isinstance(caught.value, MissingDependency)


def test_a_broken_build_is_repaired_by_its_own_name(site):
    site("engine-nightly", "1.0", module="raise ImportError('no libcuda')\n")
    with pytest.raises(DeployKitError, match=r"'engine-nightly'.*no libcuda.*force-reinstall engine-nightly"):
        require("some_engine", PACKAGE)


def test_two_builds_at_once_are_told_apart_from_a_build_and_its_parts(site):
    site("some-engine", "1.0", needs=("engine_gpu==1.0",))
    site("engine-gpu", "1.0", module=None)
    assert PACKAGE.installed_builds() == ("some-engine",)
    site("engine-nightly", "1.0", module=None)
    assert set(PACKAGE.installed_builds()) == {"some-engine", "engine-nightly"}
    assert "pip uninstall" in PACKAGE.repair
    assert "force-reinstall" not in PACKAGE.repair


def test_a_preparation_runs_before_the_first_import(site, monkeypatch):
    site("some-engine", "1.0", module="import sys\nblocked = sys.modules['some_reporter'] is None\n")
    monkeypatch.setitem(sys.modules, "some_reporter", object())
    package = OptionalPackage(
        module="some_engine", distribution="some-engine", feature="x", prepare=f"{__name__}:block"
    )
    assert require("some_engine", package).blocked


def block() -> None:
    sys.modules["some_reporter"] = None


def test_a_package_that_another_imports_is_named_with_its_own_command(site):
    site("some-engine", "1.0", module="import its_own_need\n")
    with pytest.raises(
        MissingDependency, match=r"imports 'its_own_need', which is not\. Install it: pip install its_own"
    ):
        require("some_engine", PACKAGE)


WITHOUT_TORCH = """
import sys

sys.modules["torch"] = None  # as if absent, to whoever imports or looks for it
import deploykit

try:
    {call}
except deploykit.MissingDependency as error:
    sys.exit(error.package != "torch" or "pip install torch" not in str(error))
sys.exit(2)
"""


@pytest.mark.parametrize(
    "call",
    [
        "deploykit.create_backbone('resnet18')",
        "deploykit.create_backbone('resnet18', runtime='onnxruntime')",
        "deploykit.export_backbone('resnet18', 'bundle', runtime='onnxruntime')",
        "deploykit.import_quantized('model.onnx', 'bundle', runtime='onnxruntime')",
        "from deploykit import build_fpn",
        "deploykit.BaseBackbone",
        "deploykit.backbone_names()",
    ],
)
def test_without_torch_what_needs_it_is_a_missing_dependency(call, tmp_path):
    code = WITHOUT_TORCH.format(call=call)
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
