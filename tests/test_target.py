"""Targets as data: every file describes one, a user's own is checked, and each decides what is not given."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest

from deploykit import processor
from deploykit.backends.table import BACKENDS, load_backend
from deploykit.errors import SpecError
from deploykit.export import target_options
from deploykit.export.target_options import check_runtimes, export_options, is_here, own_target, targets_here
from deploykit.processor import Processor
from deploykit.spec import BatchRange, Int8
from deploykit.target import FOLDER, MOST_BYTES, find_target, known_names, read_target, targets

MINIMAL = """
title = "A board"
machine = "x86_64"
processor = "x86-vnni"
precision = "fp32"
[[runtime]]
name = "onnxruntime"
"""
PI = Processor(model="", cores=4, int8=("dotprod",), absent=("i8mm",))
XEON = Processor(model="Intel(R) Xeon(R) Gold", cores=8, int8=("AVX2", "AVX512-VNNI"), absent=("AVX-VNNI", "AMX-INT8"))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_every_file_names_runtimes_that_are_there_and_where_its_figures_are_from(name):
    target = targets()[name]
    check_runtimes(target)
    assert set(target.runtimes) <= BACKENDS.keys()
    for choice in target.runtime:
        backend = load_backend(choice.name).on_device(choice.device)
        assert target.precision in backend.precisions
        assert choice.int8.get("float_dtype", "fp32") in backend.int8_float_dtypes
        if backend.targets and not choice.portable:
            assert own_target(backend, target) is not None
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    above = re.findall(
        r"^# .+\n(?:# .+\n)*(instructions|compute_capability|memory_mb|version|options) = ", text, re.MULTILINE
    )
    figures = re.findall(r"^(instructions|compute_capability|memory_mb|version|options) = ", text, re.MULTILINE)
    assert sorted(above) == sorted(figures), "a figure without its source above it"


def test_no_name_or_alias_stands_twice():
    names = known_names()
    assert len(set(names)) == len(names)


def test_an_alias_that_a_runtime_has_too_means_the_same_gpu():
    own = load_backend("tensorrt")
    from deploykit.backends.tensorrt.targets import DEVICES

    shared = [name for name in known_names() if name in own.targets]
    assert {"jetson-thor", "dgx-spark", "t4"} <= set(shared)
    for name in shared:
        assert find_target(name).compute_capability == DEVICES[name]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("memori_mb = 3\n", r"unknown key 'memori_mb'\. Did you mean 'memory_mb'"),
        ('instructions = ["AVX3"]\n', r"unknown instructions 'AVX3' of x86_64\. Did you mean 'AVX2'"),
        ("memory_mb = 0\n", "memory_mb is 0; expected 1 or more"),
        ('model = "("\n', "model is no regular expression"),
        ("batch = 0\n", "batch_size is 0"),
        ("batch = [4, 2, 1]\n", "batch"),
        ('memory_mb = "much"\n', r"Expected `int \| null`, got `str` - at `\$\.memory_mb`"),
        ('name = "mine"\n', "a target's name is that of its file"),
        ("title = \n", "is not TOML"),
        ("# " + "x" * MOST_BYTES + "\n", f"has more than {MOST_BYTES} bytes; a target has a few lines"),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_named(changed, message, tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(changed + MINIMAL)
    with pytest.raises(SpecError, match=message):
        read_target(path)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("devise = 'gpu'\n", r"unknown key \[\[runtime\]\] 'devise'\. Did you mean 'device'"),
        ("int8 = { calibrater = 'mse' }\n", r"unknown int8 setting 'calibrater' of onnxruntime\. Did you mean 'calib"),
        ("int8 = { calibrator = 'msee' }\n", r"int8 of onnxruntime: calibrator is 'msee'\. Did you mean 'mse'"),
        ("int8 = { percentile = nan }\n", "int8 of onnxruntime: percentile is nan"),
        ("[[runtime]]\nname = 'onnxruntime'\n", "'onnxruntime' stands there twice"),
        ("version = '1.x'\n", r"version is '1\.x' of onnxruntime; expected numbers with points, such as '1\.23'"),
    ],
)
def test_a_mistake_in_a_runtime_is_named(last, message, tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(MINIMAL + last)
    with pytest.raises(SpecError, match=message):
        read_target(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("onnxruntime", "onnxruntim", r"unknown runtime 'onnxruntim'\. Did you mean 'onnxruntime'"),
        ('"x86-vnni"', '"x86-vni"', r"unknown processor 'x86-vni'\. Did you mean 'x86-vnni'"),
        ('"x86-vnni"', '"arm64"', "processor 'arm64' is none of x86_64"),
        ('[[runtime]]\nname = "onnxruntime"', "runtime = []", r"it has no \[\[runtime\]\]\. Give at least one"),
        ('[[runtime]]\nname = "onnxruntime"', "runtime = ['onnxruntime']", "does not describe a target: Expected"),
        ('"onnxruntime"', '"torch"', "names torch, which has no engines"),
        ('"onnxruntime"', '"onnxruntime"\nportable = true', "has no portable form"),
        ('"onnxruntime"', '"openvino"\noptions = { NUM_STREAM = "2" }', "Did you mean 'NUM_STREAMS'"),
    ],
)
def test_a_file_that_names_what_is_not_there_is_refused(old, new, message, tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(MINIMAL.replace(old, new))
    with pytest.raises(SpecError, match=message):
        export_options(str(path))


def test_a_byte_order_mark_is_left_out(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(MINIMAL.replace("\n", "\r\n"), encoding="utf-8-sig")
    assert read_target(path).processor == "x86-vnni"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "board.toml")
    with pytest.raises(SpecError, match=r"board\.toml cannot be read \(a named pipe; expected a plain file\)"):
        read_target(tmp_path / "board.toml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"absent\.toml cannot be read \(No such file"):
        find_target(str(tmp_path / "absent.toml"))


def test_a_target_decides_all_that_is_not_given():
    options = export_options("t4")
    assert (options.runtime, options.target, options.target_name) == ("tensorrt", "sm75", "nvidia-t4")
    assert options.batch == BatchRange(min=1, opt=8, max=16)
    assert options.precision == Int8(float_dtype="fp16")
    ours = export_options("t4", runtime="onnxruntime", precision="fp32", batch=2, embed_preprocessing=True)
    assert (ours.runtime, ours.precision.name, ours.batch, ours.embed_preprocessing) == ("onnxruntime", "fp32", 2, True)
    assert export_options("jetson-thor").portable
    assert export_options("jetson-thor").target is None
    assert export_options("rpi5").target == "arm64"
    assert export_options("rpi5", settings={"calibrator": "minmax"}).precision.calibrator == "minmax"


def test_a_runtimes_own_targets_stay_its_own():
    options = export_options("t4", runtime="tensorrt")
    assert (options.made_for, options.target, options.precision.name) == (None, "t4", "fp32")
    assert export_options("x86-avx2", runtime="openvino").target == "x86-avx2"


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("raspbery-pi-5", {}, r"unknown target 'raspbery-pi-5'\. Did you mean 'raspberry-pi-5'"),
        ("sm89", {}, "'sm89' is a target of tensorrt, and no runtime was given"),
        (None, {}, "no runtime and no target were given"),
        ("rpi5", {"runtime": "tensorrt"}, "has the runtimes onnxruntime, openvino, and runtime='tensorrt' was given"),
        ("nvidia-l4", {"precision": "bf16"}, "no runtime of the target nvidia-l4 has bf16"),
    ],
)
def test_what_a_target_cannot_decide_is_refused(target, options, message):
    with pytest.raises(SpecError, match=message):
        export_options(target, **options)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Let this machine be another."""

    def be(machine: str, chip: Processor, board: str = "") -> None:
        (tmp_path / "model").write_text(f"{board}\0")
        monkeypatch.setattr(processor.platform, "machine", lambda: machine)
        monkeypatch.setattr(target_options, "this_processor", lambda: chip)
        monkeypatch.setattr(target_options, "DEVICE_TREE_MODEL", tmp_path / "model")

    return be


def test_this_machine_is_told_by_its_processor_and_its_board(machine):
    machine("aarch64", PI, "Raspberry Pi 5 Model B Rev 1.0")
    assert targets_here() == ("arm-neoverse", "raspberry-pi-5")
    machine("x86_64", XEON)
    assert targets_here() == ("generic-x86", "intel-xeon")
    machine("AMD64", replace(XEON, int8=("AVX2",)))
    assert targets_here() == ("generic-x86",)


def test_a_gpu_is_told_by_its_compute_capability(machine, monkeypatch):
    machine("x86_64", XEON)
    monkeypatch.setattr(target_options, "_compute_capabilities", lambda: {"sm75"})
    assert is_here(targets()["nvidia-t4"])
    assert not is_here(targets()["nvidia-l4"])
