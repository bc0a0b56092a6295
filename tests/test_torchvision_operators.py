"""timm beside torchvision builds that import as they are, lack operators, are broken, or are absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploykit import torchvision_operators as operators
from deploykit.errors import DeployKitError
from deploykit.torchvision_operators import SIGNATURES, declare_missing_operators, install_command

ROOT = Path(__file__).parent.parent
REPORT = """
import sys
import deploykit.torchvision_operators as operators
from deploykit.errors import DeployKitError
from deploykit.optional import require
try:
    require("timm")
    print("imported", len(operators._declared))
except DeployKitError as error:
    print(type(error).__name__, error)
"""


def run(code: str, *folders: Path) -> str:
    """What a fresh process prints, with ``folders`` in front of the installed packages."""
    path = ":".join(map(str, (*folders, ROOT)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": path, "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def package(folder: Path, name: str, content: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(content)
    return folder


@pytest.mark.usefixtures("timm")
def test_a_timm_backbone_is_built_in_a_fresh_process():
    code = "from deploykit import create_backbone; print(create_backbone('timm/test_resnet').name)"
    assert run(code) == "timm/test_resnet"


def test_a_whole_torchvision_gets_no_declaration(tmp_path):
    package(tmp_path, "torchvision", "")
    package(tmp_path, "timm", "import torchvision")
    assert run(REPORT, tmp_path) == "imported 0"


@pytest.mark.parametrize("operators", [["nms", "qnms"], ["qnms"]], ids="-".join)
def test_exactly_the_missing_operators_are_declared_and_refuse_to_run(tmp_path, operators):
    uses = "\n".join(f"torch.library.register_fake('torchvision::{name}')(print)" for name in operators)
    package(tmp_path, "torchvision", f"import torch\n{uses}")
    package(tmp_path, "timm", "import torchvision")
    call = "import torch\ntry: torch.ops.torchvision.qnms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
    printed = run(f"{REPORT}{call}except NotImplementedError: print('refused')", tmp_path)
    assert printed.splitlines() == [f"imported {len(operators)}", "refused"]


@pytest.mark.parametrize(
    "content",
    ["raise RuntimeError('operator torchvision::new_one does not exist')", "raise OSError('libcudart.so: not found')"],
)
def test_a_torchvision_broken_otherwise_is_named_with_its_own_remedy(tmp_path, content):
    package(tmp_path, "torchvision", content)
    package(tmp_path, "timm", "import torchvision")
    printed = run(REPORT, tmp_path)
    assert printed.startswith("DeployKitError timm needs torchvision, which is installed but does not import")
    assert printed.endswith(install_command())


def test_an_absent_torchvision_is_named_in_place_of_timm(tmp_path):
    package(tmp_path, "timm", "import torchvision")
    hide = "import sys; sys.modules['torchvision'] = None\n"
    printed = run(hide + REPORT, tmp_path)
    assert printed.startswith("MissingDependency the package 'timm' is installed, and imports 'torchvision'")
    assert printed.endswith(install_command())


def test_the_command_names_the_release_for_the_installed_torch(monkeypatch):
    for torch_version, wanted in (("2.13.0+cpu", "0.28"), ("2.9.1", "0.24")):
        monkeypatch.setattr("importlib.metadata.version", lambda name, found=torch_version: found)
        assert install_command() == f"pip install --no-deps 'torchvision=={wanted}.*'"


def test_the_table_names_operators_with_a_signature():
    assert all(signature.startswith("(") and "->" in signature for signature in SIGNATURES.values())


def test_the_operators_are_declared_once_in_a_process(timm):
    """torchvision is imported already: nothing is looked for again."""
    declared = len(operators._declared)
    declare_missing_operators()
    assert len(operators._declared) == declared


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Let torchvision be imported anew, from a package with this content; what was imported comes back at the end."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return lambda content: package(tmp_path, "torchvision", content)


def test_a_package_that_torchvision_lacks_is_named_by_its_own_error(broken):
    broken("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        declare_missing_operators()


def test_a_torchvision_that_fails_otherwise_is_named_with_the_release_to_install(broken):
    broken("raise OSError('libcudart.so: not found')")
    with pytest.raises(
        DeployKitError, match=r"does not import \(libcudart\.so: not found\)\. Fix: install the release"
    ):
        declare_missing_operators()


def test_an_absent_torchvision_is_no_matter(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(operators.importlib.util, "find_spec", lambda name: None)
    declare_missing_operators()
    assert "torchvision" not in sys.modules


def test_without_torch_any_torchvision_will_do(monkeypatch):
    def absent(name):
        raise operators.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert install_command() == "pip install --no-deps torchvision"
