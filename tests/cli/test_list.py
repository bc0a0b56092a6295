"""``deploykit list``: sizes and work of the backbones, and what the runtimes can compute in."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deploykit.cli import list as list_module


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))


def test_figures_are_the_published_ones(call):
    told = call("list", "--filter", "resnet50", "--json").json()
    (row,) = told["backbones"]
    assert (row["name"], row["family"], row["image_size"]) == ("resnet50", "resnet", [224, 224])
    assert row["parameters"] == 25_557_032
    assert row["gmacs"] == pytest.approx(4.09, abs=0.01)
    assert row["strides"] == {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}


def test_the_text_states_the_convention_and_the_runtimes(call):
    done = call("list", "--filter", "efficientnet_lite[01]")
    assert done.code == 0, done.err
    assert "efficientnet_lite1" in done.out
    assert "resnet18" not in done.out
    assert "multiply-accumulates" in done.out
    assert "fp32, fp16, int8" in done.out
    assert done.out.splitlines()[-1] == "Next: deploykit export efficientnet_lite0 --runtime onnxruntime"


def test_a_family_alone_is_listed_in_full(call):
    from deploykit.backbones.registry import backbone_class, backbone_names

    told = call("list", "--family", "resnetv2", "--json").json()
    expected = [name for name in backbone_names() if backbone_class(name).family == "resnetv2"]
    assert [row["name"] for row in told["backbones"]] == expected


def test_figures_are_remembered_until_the_code_changes(call, monkeypatch):
    measured = []
    measure = list_module.measure
    monkeypatch.setattr(list_module, "measure", lambda name: measured.append(name) or measure(name))
    first = call("list", "--filter", "resnet18", "--json").out
    assert call("list", "--filter", "resnet18", "--json").out == first
    assert measured == ["resnet18"]
    monkeypatch.setattr(list_module, "installed_version", lambda module: "another")
    call("list", "--filter", "resnet18", "--json")
    assert measured == ["resnet18", "resnet18"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--family", "resnets"), "unknown family 'resnets'. Did you mean 'resnet'"),
        (("--filter", "resnet19*"), "no backbone matches 'resnet19*'"),
    ],
)
def test_nothing_to_list_is_bad_usage(call, words, message):
    done = call("list", *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_a_terminal_shows_that_it_counts(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(list_module, "stderr_console", lambda: console)
    assert list(list_module._shown_progress(["resnet18", "resnet34"])) == ["resnet18", "resnet34"]
    assert "counting operations" in console.file.getvalue()
    assert list(list_module._shown_progress([])) == []
