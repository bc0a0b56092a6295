"""The table of variants: published accuracies that fit the code, figures that survive a rerun, a table in a page."""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploykit.backbones.registry import ALIASES, backbone_class, backbone_names
from deploykit.backbones.weights import default_source
from deploykit.errors import DeployKitError, ExportError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "variants.py"
SELECTION = SCRIPT.parent.parent / "docs" / "selection.md"
SMALL = "mobilenetv3_small_075"

NOT_PUBLISHED = {
    # Variants for which timm publishes no weights, with the padding that they have here.
    *("efficientnet_lite1", "efficientnet_lite2", "efficientnet_lite3", "efficientnet_lite4"),
    *("efficientnetv2_s", "efficientnetv2_m", "mobilenetv3_large_075"),
    # Weights without an ImageNet-1k classifier.
    *("vit_large_patch32_224", "vit_base_r50_s16_224"),
    *(f"vit_{size}_patch14_{kind}" for size in ("small", "base", "large") for kind in ("dinov2", "reg4_dinov2")),
}


def shipped() -> list[str]:
    """The variants of deploykit, without those of its tests."""
    return [name for name in backbone_names() if backbone_class(name).__module__.startswith("deploykit.")]


@pytest.fixture(scope="module")
def variants():
    spec = importlib.util.spec_from_file_location("benchmark_variants", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def small_shape(variants):
    return {SMALL: variants.shape(SMALL)}


def test_every_variant_has_a_published_accuracy_or_is_known_to_have_none(variants):
    assert set(variants.published()) | NOT_PUBLISHED == set(shipped())
    assert not set(variants.published()) & NOT_PUBLISHED


def test_published_accuracies_are_of_the_default_weights_at_the_variants_size(variants):
    for name, accuracy in variants.published().items():
        source = default_source(backbone_class(name), name)
        assert (accuracy.tag, (accuracy.image_size,) * 2) == (source.tag, source.image_size), name
        assert 50 < accuracy.top1 < 90, name


def test_the_accuracy_file_names_its_source_date_and_licence(variants):
    head = [line for line in variants.ACCURACY_FILE.read_text().splitlines() if line.startswith("#")]
    assert all(part in " ".join(head) for part in ("results/results-imagenet.csv", "2025-10-30", "Apache-2.0"))


def test_models_take_turns_and_every_second_call_is_timed(variants):
    order = []

    def model(name, seconds):
        def call(images):
            first = order.count(name) % 2 == 0
            order.append(name)
            time.sleep(0.02 if first else seconds)

        return call

    medians = variants.time_in_turns({"slow": model("slow", 0.01), "fast": model("fast", 0.001)}, None, rounds=2)
    assert order == ["slow", "slow", "fast", "fast"] * (2 + variants.WARM_UP)
    assert 1 <= medians["fast"] < medians["slow"] < 20


@pytest.mark.slow
def test_the_runtimes_compute_the_same_logits_from_one_export(variants):
    with variants.opened(SMALL, ("torch", "onnxruntime", "openvino")) as models:
        images = variants.images_for(models["torch"].input_spec)
        logits = {name: model(images) for name, model in models.items()}
    for name in ("onnxruntime", "openvino"):
        assert logits[name].shape == (1, 1000)
        np.testing.assert_allclose(logits[name], logits["torch"], rtol=1e-3, atol=1e-4 * np.abs(logits["torch"]).max())


@pytest.mark.slow
def test_torch_compile_is_timed_beside_torch(variants):
    found = variants.measure_in_a_process(SMALL, ("torch", "torch_compile"), 1)
    assert [figure.runtime for figure in found] == ["torch", "torch_compile"]
    assert all(figure.milliseconds > 0 for figure in found)


@pytest.fixture
def counted(variants, small_shape, monkeypatch):
    """The names measured, with a measurement that takes no time."""
    names = []

    environment = variants.here()

    def measure(name, runtimes, rounds):
        names.append((name, tuple(runtimes)))
        return [
            variants.Figure(variant=name, runtime=runtime, milliseconds=2.5, rounds=rounds, environment=environment)
            for runtime in runtimes
        ]

    monkeypatch.setattr(variants, "measure_in_a_process", measure)
    monkeypatch.setattr(variants, "shape", lambda name: small_shape[SMALL])
    return names


def test_figures_in_the_results_file_are_not_measured_again(variants, counted, tmp_path, capsys):
    results = ["--results", str(tmp_path / "figures.jsonl"), "--variants", SMALL]
    variants.main([*results, "--runtimes", "torch", "openvino"])
    variants.main([*results, "--compile", SMALL])
    variants.main([*results, "--compile", SMALL])
    assert counted == [(SMALL, ("torch", "openvino")), (SMALL, ("torch_compile", "onnxruntime"))]
    row = next(line for line in reversed(capsys.readouterr().out.splitlines()) if line.startswith(f"| {SMALL} |"))
    assert row.endswith("| 2.5 | 2.5 | 2.5 | 2.5 |")


def test_figures_of_another_machine_are_refused(variants, counted, tmp_path):
    path = tmp_path / "figures.jsonl"
    elsewhere = replace(variants.here(), processor="another one")
    variants.append_results(path, [replace(figure_of(variants), environment=elsewhere)])
    with pytest.raises(SystemExit, match="another one"):
        variants.main(["--results", str(path), "--variants", SMALL])
    variants.main(["--results", str(path), "--table-only"])
    assert not counted


def figure_of(variants):
    return variants.Figure(
        variant=SMALL, runtime="onnxruntime", milliseconds=1.25, rounds=9, environment=variants.here()
    )


def test_large_variants_and_other_compiles_are_left_out(variants, counted):
    variants.main(["--variants", SMALL, "--max-gmacs", "0.01"])
    variants.main(["--variants", SMALL, "--compile", "resnet18"])
    assert counted == [(SMALL, ("torch", "onnxruntime", "openvino"))]


def test_a_variant_that_fails_is_named_after_the_others_were_measured(variants, counted, monkeypatch, capsys):
    working = variants.measure_in_a_process

    def measure(name, *rest):
        if name == "resnet18":
            raise ExportError("no form for it")
        return working(name, *rest)

    monkeypatch.setattr(variants, "measure_in_a_process", measure)
    with pytest.raises(SystemExit, match="resnet18: no form for it"):
        variants.main(["--variants", "resnet18", SMALL])
    assert counted and f"| {SMALL} |" in capsys.readouterr().out


def test_a_process_that_fails_is_an_error_with_its_reason(variants):
    with pytest.raises(DeployKitError, match="unknown backbone 'no_such_variant'"):
        variants.measure_in_a_process("no_such_variant", ("torch",), 1)


def test_a_runtime_that_crashes_is_an_error_with_its_signal(variants, monkeypatch, tmp_path):
    crash = tmp_path / "crash.py"
    crash.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(variants, "__file__", str(crash))
    with pytest.raises(DeployKitError, match="signal 11"):
        variants.measure_in_a_process(SMALL, ("openvino",), 1)


def test_a_row_says_what_was_measured_and_published(variants, small_shape):
    text = variants.table(small_shape, [figure_of(variants)])
    assert text.splitlines()[-1] == (
        f"| {SMALL} | 2.0 | 0.0434 | 224 | 2:16 4:16 8:24 16:40 32:432 | 65.3 (lamb_in1k) | - | - | 1.2 | - |"
    )
    assert "median of 9 alternating rounds" in text


def test_blocks_of_a_plain_vit_are_counted_instead_of_listed(variants):
    assert variants.levels_cell(variants.shape("vit_tiny_patch16_224").levels) == "12 blocks 16:192"


def test_the_table_replaces_only_what_stands_between_the_markers(variants, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{variants.BEGIN}\nold\n{variants.END}\nafter\n")
    variants.write_between_markers(page, "new")
    assert page.read_text() == f"before\n{variants.BEGIN}\nnew\n{variants.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks"):
        variants.write_between_markers(page, "new")


def test_a_pattern_that_matches_nothing_is_refused(variants):
    with pytest.raises(SystemExit, match="resnet19"):
        variants.chosen(["resnet18", "resnet19"])


def test_the_default_variants_are_those_of_the_aliases(variants):
    assert set(variants.parse([]).variants) == set(ALIASES.values())


def cells_of(line: str) -> list[str]:
    return [cell.strip(" `") for cell in line.strip("|").split("|")]


def static_cells(variants, name: str) -> list[str]:
    """Parameters, GMACs, size and top-1 as a table shows them."""
    row = variants.table({name: variants.shape(name)}, []).splitlines()[-1]
    _, parameters, gmacs, pixels, _, accuracy, *_ = cells_of(row)
    return [parameters, gmacs, pixels, accuracy.partition(" ")[0]]


def test_the_page_recommends_variants_with_their_true_figures(variants):
    advice, _, _ = SELECTION.read_text().partition("## The table")
    rows = [cells_of(line) for line in advice.splitlines() if line.startswith("|") and "`" in line]
    assert len(rows) >= 10
    for _, name, *figures in rows:
        assert figures == static_cells(variants, name), name


def test_the_pages_table_has_a_row_for_every_variant(variants):
    assert [row[0] for row in rows_of_the_page(variants)] == shipped()


@pytest.mark.slow
def test_the_pages_table_says_what_the_code_counts(variants):
    for row in rows_of_the_page(variants):
        name, parameters, gmacs, pixels, _, accuracy, *_ = row
        found = [parameters, gmacs, pixels, accuracy.partition(" ")[0]]
        assert found == static_cells(variants, name), name


def rows_of_the_page(variants) -> list[list[str]]:
    _, _, rest = SELECTION.read_text().partition(variants.BEGIN)
    table, end, _ = rest.partition(variants.END)
    assert end
    return [cells_of(line) for line in table.splitlines() if line.startswith("| ")][1:]
