"""Manifests that anybody may have written: odd numbers, odd text, odd JSON."""

from __future__ import annotations

import json
import time

import pytest

from deploykit.bundle import MANIFEST, MANIFEST_DIGEST, open_bundle, read_manifest
from deploykit.bundle_files import digest_line
from deploykit.errors import BundleError
from deploykit.loading import load_bundle
from tests.test_bundle import make

HUGE = 10**30


@pytest.fixture
def bundle(tmp_path):
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


def rewrite(folder, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_DIGEST).write_bytes(digest_line(data))


def put(folder, path: str, value: str) -> None:
    """Set a value by its path, written as it is."""
    raw = json.loads((folder / MANIFEST).read_text())
    *parents, last = path.split(".")
    inner = raw
    for name in parents:
        inner = inner[int(name) if isinstance(inner, list) else name]
    inner[int(last) if isinstance(inner, list) else last] = "@@"
    rewrite(folder, json.dumps(raw).replace('"@@"', value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("input.height", "0"),
        ("input.height", "-224"),
        ("input.width", str(HUGE)),
        ("input.channels", "1e999"),
        ("input.channels", "3.5"),
        ("input.batch", "0"),
        ("input.batch", "-1"),
        ("input.batch", f'{{"min": 1, "opt": 1, "max": {HUGE}}}'),
        ("input.preprocessing", '{"mean": [NaN, 0, 0], "std": [1, 1, 1]}'),
        ("input.preprocessing", '{"mean": [0, 0, 0], "std": [Infinity, 1, 1]}'),
        ("input.preprocessing", '{"mean": [0, 0, 0], "std": [-Infinity, 1, 1]}'),
        ("outputs.0.shape.1", "-8"),
        ("outputs.0.shape.1", str(HUGE)),
        ("outputs.0.shape.1", "9" * 5000),
        ("outputs", "[]"),
        ("backbone.num_classes", "-1"),
        ("backbone.levels.0.stride", "0"),
        ("backbone.levels.0.channels", str(HUGE)),
        ("backbone.image_size", "[0, 32]"),
        ("speedup", "0"),
        ("speedup", "-1.5"),
        ("speedup", "NaN"),
        ("precision", '"int4"'),
        ("precision_settings.min_sqnr_db", '"high"'),
        ("precision_settings.min_sqnr_db", "true"),
        ("precision_settings.min_sqnr_db", "1e400"),
        ("precision_settings.percentile", '"all"'),
        ("precision_settings.unknown", "1"),
        ("files", '{"engine.onnx": {"size": -6, "sha256": "' + "0" * 64 + '"}}'),
        ("files", '{"engine.onnx": {"size": ' + str(HUGE) + ', "sha256": "' + "0" * 64 + '"}}'),
        ("files", '{"engine.onnx": {"size": 6, "sha256": "' + "Z" * 64 + '"}}'),
        ("files", '{"engine.onnx": {"size": 6, "sha256": ""}}'),
        ("schema_version", "1e0"),
        ("schema_version", str(-HUGE)),
    ],
)
def test_odd_numbers_are_refused_by_both_readers(bundle, path, value):
    put(bundle, path, value)
    for read in (read_manifest, open_bundle):
        with pytest.raises(BundleError, match=MANIFEST) as caught:
            read(bundle)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        '{"schema_version": 1, "schema_version": 1}',
        '{"a": {"b": 1, "c": 2, "b": 3}}',
        "[" * 200_000,
        '{"a":' * 200_000,
        b'\xef\xbb\xbf{"schema_version": 1}',
        '{"schema_version": 1}'.encode("utf-16"),
        b'{"schema_version": 1, "x": "\xff"}',
        '{"schema_version": 1} {}',
        "NaN",
        "1" * 10_000,
        '"' + "a" * 1_000_000 + '"',
    ],
)
def test_json_that_no_export_writes_is_refused_at_once(bundle, text):
    rewrite(bundle, text)
    begun = time.monotonic()
    for read in (read_manifest, open_bundle):
        with pytest.raises(BundleError, match=MANIFEST):
            read(bundle)
    assert time.monotonic() - begun < 5


def test_a_key_that_stands_twice_is_named(bundle):
    text = (bundle / MANIFEST).read_text()
    rewrite(bundle, text.replace('"engine": "engine.onnx"', '"engine": "engine.onnx", "engine": "weights/engine.bin"'))
    with pytest.raises(BundleError, match="'engine' stands there twice"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "text", ["\x1b[2J\x1b[31mresnet", "a\x9b31mb", "a\rb", "a\u202eb", "a\ud800b", "a\x07b", "a\x00b", "a\u2028b"]
)
@pytest.mark.parametrize("path", ["backbone.name", "runtime_version", "tools.deploykit", "outputs.0.name"])
def test_text_that_acts_on_a_terminal_is_refused_and_never_repeated_raw(bundle, path, text):
    put(bundle, path, json.dumps(text))
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert not set(str(caught.value)) & set("\x1b\x9b\r\u202e\ud800\x07\x00\u2028")


def test_markup_and_other_alphabets_are_only_text(bundle):
    put(bundle, "backbone.name", '"[bold]日本語 é[/bold]"')
    assert open_bundle(bundle).backbone.name == "[bold]日本語 é[/bold]"


def test_file_names_that_act_on_a_terminal_are_not_repeated_raw(bundle):
    (bundle / "\x1b[31mred").write_text("x")
    (bundle / "line\nbreak").write_text("x")
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert "\\x1b[31mred" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_runtime_without_engines_is_refused(bundle):
    put(bundle, "runtime", '"torch"')
    with pytest.raises(BundleError, match="names the runtime torch, which is the module itself"):
        load_bundle(bundle)
