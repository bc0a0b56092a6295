"""Whatever is passed, and whatever is typed: an answer or a typed error, and never a bare one."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import deploykit
from deploykit.cli.main import main
from deploykit.errors import DeployKitError
from tests.backends.bundles import write_bundle
from tests.tiers import WHOLE, examples

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

NAME = "mobilenetv2_050"

THINGS: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**63, 10**30, 1.5, float("nan"), float("inf"), 1j, b"", b"bytes", ...),
    *(
        "",
        " ",
        "resnet18",
        "Resnet18",
        NAME,
        "timm/",
        "timm/nothing",
        "\x00",
        "ü",
        "\ud800",
        "a" * 5000,
        "nothing/there",
    ),
    *("int8", "fp32", "onnxruntime", "cpu", "cuda:99", "auto", "sm89", "[red]markup[/red]", "\x1b[31m", "-1"),
    *([], [1], ["stage1"], [None], (), (1, 2), (1, 2, 3), (2.5, "x"), {}, {"a": 1}, {1: 2}, set(), range(3), object()),
    *(int, len, Path("nothing-there"), Path("/dev/null"), np.float32(3), np.int64(-2), np.array(4)),
    *(np.zeros(0), np.zeros((1, 3, 32, 32), np.float32), np.zeros((32, 32, 3), np.uint8), np.zeros((1, 3, 0, 32))),
    *(np.zeros((2, 2), object), np.array(["a"]), np.full((1, 3, 32, 32), np.nan, np.float32), np.zeros((1,) * 7)),
    *(torch.zeros(3), torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32, device="meta"), torch.nn.Identity()),
    *(torch.nn.Linear(3, 4), Image.new("L", (5, 7)), Image.new("RGB", (32, 32)), deploykit.Fp32(), deploykit.Int8()),
    deploykit.Preprocessing(),
]
things = st.sampled_from(THINGS)
WORDS = [
    *("", "--", "-", "resnet18", NAME, "nothing", "0", "-1", "1e99", "nan", "\x00", "ü", "a" * 3000, "[b]", "."),
    *(
        "--json",
        "--help",
        "--output",
        "-o",
        "--runtime",
        "onnxruntime",
        "onnx",
        "--precision",
        "int8",
        "--top",
        "--key",
    ),
    *("--device", "cuda:9", "--threads", "--image-size", "32", "--calibration", "--target", "sm89", "--num-classes"),
    *(
        "--dry-run",
        "--record",
        "--trust",
        "--signed-by",
        "--reference",
        "--images",
        "--labels",
        "--mean",
        "1,2",
        "--limit",
    ),
    *(
        "--layout",
        "triton",
        "--seconds",
        "0.1",
        "--for",
        "hf:nobody/nothing",
        "oci:nothing",
        "--min-sqnr-db",
        "--overwrite",
    ),
]
COMMANDS = ["run", "verify", "inspect", "sign", "compare", "evaluate", "cache", "export", "no"]
FURTHER = [
    *(
        "bench",
        "extract",
        "import",
        "list",
        "pull",
        "push",
        "report",
        "repository",
        "sensitivity",
        "sweep",
        "targets",
        "tune",
    ),
    "doctor",
]
"""Commands that measure or calibrate where the words happen to ask for it: tried by make test-all."""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A bundle, and files that are none of what they may be taken for."""
    root = tmp_path_factory.mktemp("misuse")
    found = {"bundle": write_bundle(root / "bundle", "onnxruntime"), "empty": root / "empty", "text": root / "text.jpg"}
    found["empty"].mkdir()
    found["text"].write_text("no image")
    Image.new("RGB", (40, 30)).save(root / "image.png")
    found |= {"image": root / "image.png", "root": root}
    return found


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return deploykit.create_backbone(NAME, num_classes=4, image_size=32)


CALLS = [
    *("create_backbone", "load_bundle", "verify_bundle", "sign_bundle", "compare_bundles", "preprocess", "load_images"),
    *(
        "BatchRange",
        "Int8",
        "Fp16",
        "Preprocessing",
        "build_fpn",
        "FeatureSelector",
        "FeaturePyramid",
        "CalibrationSet",
    ),
    *("memory_efficient", "compressed_activations", "FeatureCache", "assert_parity", "evaluate", "backbone_names"),
    *("TensorSpec", "FeatureLevel", "export_backbone", "model", "model.predict", "engine", "engine.predict"),
]


def keywords(function: Any) -> dict[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: each for name, each in parameters.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}


def called(function: Any, data: st.DataObject, usual: list[Any]) -> None:
    """Call with every required argument and up to two others, each a thing or what is usual."""
    parameters = keywords(function)
    needed = [name for name, each in parameters.items() if each.default is each.empty]
    others = sorted(parameters.keys() - set(needed))
    extra = data.draw(st.lists(st.sampled_from(others), max_size=2, unique=True)) if others else []
    values = {name: data.draw(st.one_of(things, st.sampled_from(usual))) for name in (*needed, *extra)}
    positional = [values.pop(n) for n in list(values) if parameters[n].kind is inspect.Parameter.POSITIONAL_ONLY]
    function(*positional, **values)


@pytest.mark.timeout(7200 if WHOLE else 600)
@settings(
    max_examples=examples(100, whole=1600),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_function_answers_or_raises_a_typed_error(data, places, model, monkeypatch):
    monkeypatch.chdir(places["empty"])
    name = data.draw(st.sampled_from(CALLS))
    usual: list[Any] = [model, *places.values(), str(places["bundle"]), places["root"] / "new" / "one"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if name.startswith("engine"):
                with deploykit.load_bundle(places["bundle"]) as engine:
                    called(engine.predict if name.endswith("predict") else engine, data, usual)
            elif name.startswith("model"):
                called(model.predict if name.endswith("predict") else model.__call__, data, usual)
            else:
                called(getattr(deploykit, name), data, usual)
        except DeployKitError as error:
            assert len(str(error)) > 10, error


@pytest.mark.timeout(7200 if WHOLE else 600)
@settings(
    max_examples=examples(8, whole=400),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_command_line_ends_with_a_code_and_a_message(data, places, monkeypatch, capsys):
    monkeypatch.chdir(places["empty"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = [str(path) for path in places.values()]
    words = data.draw(st.lists(st.one_of(st.sampled_from(WORDS), st.sampled_from(paths)), max_size=5))
    command = data.draw(st.sampled_from(COMMANDS + FURTHER if WHOLE else COMMANDS))
    if command == "export":
        words += ["--dry-run"]
    code = main([command, *words])
    out, err = capsys.readouterr()
    assert code in range(8), (code, err)
    assert "Traceback" not in err
    assert code == 0 or (out + err).strip()
