from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from deploykit import export_backbone
from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.inductor import lower as module
from deploykit.backends.inductor.modes import (
    DEFAULT_MODE,
    ModeChoice,
    fastest,
    keep_mode,
    mode_address,
    recall_mode,
    weighted_work,
)
from deploykit.backends.inductor.passes import DIALECT
from deploykit.backends.inductor.targets import FASTEST_MODE, INDUCTOR_MODES
from deploykit.errors import ExportError, SpecError
from deploykit.export.graphs import select
from deploykit.graph import Master, TorchProgram
from deploykit.store import Store, address
from tests.calibration.networks import Tokens, master_of, plan_of
from tests.conftest_graphs import tiny_program
from tests.small_resnet import SMALL

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
CHOICE = ModeChoice(mode="templates", milliseconds={"onednn": 2.5, "templates": 2.0})


@pytest.fixture(scope="module")
def master() -> Master:
    return master_of(Tokens, IMAGES)


@pytest.fixture(scope="module")
def tokens(master: Master) -> TorchProgram:
    return master.torch


def lower(program: TorchProgram, folder: Path, target: str | None = None) -> Engine:
    return module.lower(program, folder, LowerOptions(target=target))


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "inductor-modes"


@pytest.fixture(scope="module")
def packages() -> dict[str, bytes]:
    """The package of one network in each mode, compiled when first asked for."""
    return {}


@pytest.fixture
def compiled(packages: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The settings of every compilation; those that a test of this module made before are not made again."""
    settings: list[dict[str, object]] = []
    compile_package = torch._inductor.aoti_compile_and_package

    def recording(program, *, package_path, inductor_configs):
        settings.append(inductor_configs)
        if repr(inductor_configs) not in packages:
            compile_package(program, package_path=package_path, inductor_configs=inductor_configs)
            packages[repr(inductor_configs)] = Path(package_path).read_bytes()
        Path(package_path).write_bytes(packages[repr(inductor_configs)])

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", recording)
    return settings


def test_one_choice_serves_the_outputs_of_one_network_and_no_other_work(master: Master, tokens: TorchProgram):
    assert len(weighted_work(tokens.program)) == 10  # patches, four in each run of the block, the head
    part = select(tokens, ("logits",))
    assert part.outputs != tokens.outputs
    assert mode_address(part.program) == mode_address(tokens.program)
    assert mode_address(tiny_program().program) != mode_address(tokens.program)
    integers = DIALECT.render(tokens, plan_of(master.onnx, IMAGES), IMAGES).graph.program
    assert mode_address(integers) != mode_address(tokens.program)


def test_threads_are_part_of_the_key(tokens: TorchProgram):
    threads = torch.get_num_threads()
    before = mode_address(tokens.program)
    try:
        torch.set_num_threads(threads + 1)
        assert mode_address(tokens.program) != before
    finally:
        torch.set_num_threads(threads)


def test_the_fastest_is_the_one_that_takes_least():
    choice = fastest({"onednn": lambda: time.sleep(0.004), "templates": lambda: time.sleep(0.001)})
    assert choice.mode == "templates"
    assert choice.milliseconds["onednn"] > choice.milliseconds["templates"]
    assert list(choice.as_text()) == ["mode", "onednn_ms", "templates_ms"]


def test_a_choice_is_kept_and_a_damaged_or_foreign_one_forgotten(memory: Path):
    where = address("inductor-modes", {"work": []})
    assert recall_mode(where) is None
    keep_mode(where, CHOICE)
    assert recall_mode(where) == CHOICE
    (file,) = memory.rglob("value")
    file.write_text(file.read_text().replace("templates", "autotuned"))
    assert recall_mode(where) is None
    for kept in (b"{", b'{"mode": "of-another-version", "milliseconds": {}}'):
        Store().save(where, kept)
        assert recall_mode(where) is None


@pytest.mark.slow  # inductor compiles each template that it considers
def test_the_fastest_is_measured_once_and_then_remembered(
    tokens: TorchProgram, memory: Path, compiled: list[dict[str, object]], tmp_path: Path
):
    assert lower(tokens, tmp_path).compiler == {"mode": DEFAULT_MODE}
    assert len(compiled) == 1
    measured = lower(tokens, tmp_path, target=FASTEST_MODE)
    assert len(compiled) == 1 + len(INDUCTOR_MODES)
    assert set(measured.compiler) == {"mode", *(f"{mode}_ms" for mode in INDUCTOR_MODES)}
    assert len(list(memory.iterdir())) == 1
    for target in (FASTEST_MODE, None):
        assert lower(select(tokens, ("logits",)), tmp_path, target=target).compiler == measured.compiler
    assert len(compiled) == 3 + len(INDUCTOR_MODES)
    assert compiled[-1].items() >= INDUCTOR_MODES[measured.compiler["mode"]].items()


@pytest.mark.parametrize("broken", [["templates"], list(INDUCTOR_MODES)], ids=["one", "all"])
def test_a_mode_that_does_not_compile_is_left_out(
    broken: list[str],
    memory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def compile_or_fail(program, staging, mode):
        if mode in broken:
            raise ExportError(f"{mode} does not compile")
        (staging / mode).mkdir()
        (staging / mode / "model.pt2").write_text(mode)
        return staging / mode / "model.pt2"

    monkeypatch.setattr(module, "_compile", compile_or_fail)
    monkeypatch.setattr(module, "_call", lambda package, spec: package.read_text)
    if len(broken) == len(INDUCTOR_MODES):
        with pytest.raises(ExportError, match="onednn does not compile"):
            lower(tiny_program(), tmp_path, target=FASTEST_MODE)
        assert not memory.exists()
        return
    engine = lower(tiny_program(), tmp_path, target=FASTEST_MODE)
    assert set(engine.compiler) == {"mode", "onednn_ms", "autotuned_ms"}
    assert (tmp_path / "model.pt2").read_text() == engine.compiler["mode"]
    assert "'templates' is left out: templates does not compile" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("mode", INDUCTOR_MODES)
def test_a_mode_asked_for_is_the_one_compiled(
    mode: str, tokens: TorchProgram, memory: Path, compiled: list[dict[str, object]], tmp_path: Path
):
    engine = lower(tokens, tmp_path, target=mode)
    assert [{key: settings[key] for key in INDUCTOR_MODES[mode]} for settings in compiled] == [INDUCTOR_MODES[mode]]
    assert engine.compiler == {"mode": mode}
    assert not memory.exists()


def test_an_unknown_mode_is_refused_with_the_nearest(tmp_path: Path):
    with pytest.raises(SpecError, match=r"unknown torch_compile target 'template'.*templates"):
        export_backbone(SMALL, tmp_path / "bundle", runtime="torch_compile", target="template", image_size=32)
    assert not list(tmp_path.iterdir())
