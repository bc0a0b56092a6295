"""What a bundle says of itself: ``manifest.json``, typed, and read as text that anybody may have written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn, TypeAlias

import msgspec

import deploykit
from deploykit.errors import BundleError, SpecError
from deploykit.optional import DISTRIBUTION
from deploykit.printable import is_printable
from deploykit.spec import BackboneSpec, InputSpec, TensorSpec, parse_precision

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
MOST_MANIFEST_BYTES = 16 << 20
"""A manifest has a few thousand bytes, and a hundred more for each file and level."""

Status: TypeAlias = Literal["built", "executed", "parity_checked"]

MOST = 1 << 30
"""What no side of an input or output, no batch, and no number of channels exceeds."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """The size in bytes and the SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """The device that an engine was made for: its instruction set, its INT8 instructions, where the engine runs there.

    ``options`` are the runtime's own settings when the engine is opened. ``memory_mb`` is the budget of its files.
    """

    name: str
    title: str
    machine: str | None = None
    instructions: tuple[str, ...] = ()
    device: str = "auto"
    options: dict[str, str] = field(default_factory=dict)
    memory_mb: int | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself.

    ``engine`` is the file that the runtime opens. ``requires`` is what the engine is tied to
    beyond ``runtime_version`` (a compute capability, an instruction set). ``made_for`` is the device that ``target``
    names; None: a target of the runtime's own, or none. ``status`` is what was seen
    of the engine: ``built``, no more; ``executed``, it ran, and its numbers were not all within the
    budget; ``parity_checked``, it ran, and they were. ``seen_on`` is where: machine, device, versions.
    ``compiler`` is what the runtime's compiler chose by measuring, and what each choice cost.
    ``speedup`` is the FP32 engine's time over this one's on the machine that exported it; None: not timed.
    """

    schema_version: int = SCHEMA_VERSION
    backbone: BackboneSpec
    input: InputSpec
    outputs: tuple[TensorSpec, ...]
    runtime: str
    runtime_version: str
    precision: str
    precision_settings: dict[str, Any] = field(default_factory=dict)
    engine: str
    status: Status = "built"
    seen_on: dict[str, str] = field(default_factory=dict)
    target: str | None = None
    made_for: MadeFor | None = None
    requires: dict[str, str] = field(default_factory=dict)
    weights_digest: str
    calibration_digest: str | None = None
    fusions: dict[str, int] = field(default_factory=dict)
    compiler: dict[str, str] = field(default_factory=dict)
    speedup: float | None = None
    tools: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)


def decode_manifest(text: bytes, path: Path) -> Manifest:
    """Decode a manifest that anybody may have written.

    Args:
        text: the bytes of the file.
        path: its name, for messages.

    Raises:
        BundleError: it is not JSON, not a manifest, from a newer schema, or holds values that no bundle has.
    """
    raw = _parse(text, path)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(version) is not int or version < 1:
        raise BundleError(
            f"{path} is not a bundle's manifest: its schema_version is {version!r:.40}; expected 1 to "
            f"{SCHEMA_VERSION}. Give the folder that `deploykit export` wrote."
        )
    if version > SCHEMA_VERSION:
        raise BundleError(_newer(path, version, raw))
    try:
        manifest = msgspec.convert(raw, Manifest)
    except (msgspec.ValidationError, SpecError, RecursionError, OverflowError) as error:
        raise BundleError(f"{path} does not fit schema {version}: {error}. Export the bundle again.") from error
    bad = [name for name in (manifest.engine, *manifest.files) if not is_inside(name)]
    if bad:
        raise BundleError(
            f"{path} names files outside the bundle: {', '.join(map(repr, bad))}; expected relative paths below it. "
            "Do not open this bundle: it was not written by deploykit."
        )
    problems = list(_odd_values(manifest))
    if problems:
        raise BundleError(f"{path} does not fit schema {version}: {'; '.join(problems)}. Export the bundle again.")
    return manifest


def recorded_names(text: bytes, path: Path) -> frozenset[str]:
    """Return the names of the files that a manifest of any schema records.

    Raises:
        BundleError: it cannot be read.
    """
    raw = _parse(text, path)
    files = raw.get("files") if isinstance(raw, dict) else None
    return frozenset(files if isinstance(files, dict) else ())


def is_inside(name: str) -> bool:
    """Return whether a name is that of a file below the bundle, written in the one way there is."""
    path = PurePosixPath(name)
    plain = bool(name) and "\\" not in name and "\0" not in name and str(path) == name
    return plain and not path.is_absolute() and ".." not in path.parts and name not in (".", MANIFEST, MANIFEST_DIGEST)


def engine_parts(engine: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return which files make up an engine: those with its stem beside it, or all of the folder that it has to itself.

    ``model.xml`` has ``model.bin``, ``model.onnx`` has ``model.onnx.data``; the engine itself is the first.
    """
    whole = PurePosixPath(engine)
    start = f"{whole.parent}/" if whole.parent.name else f"{whole.stem}."
    return (engine, *(name for name in sorted(names) if name.startswith(start) and name != engine))


def own_version() -> dict[str, str]:
    """Return deploykit's version, as a manifest's ``tools`` name it."""
    return {"deploykit": deploykit.__version__}


def _parse(text: bytes, path: Path) -> Any:
    """JSON as Python's types, of which nothing is silently lost: no key twice, no NaN, no infinity."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_number, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} is not JSON that deploykit writes ({error}). The bundle is damaged: copy or export it again."
        ) from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.60} stands there twice")
    return found


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text[:20])


def _odd_values(manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with values that have the right types."""
    for name, record in manifest.files.items():
        if not 0 <= record.size < 1 << 63 or not _SHA256.fullmatch(record.sha256):
            yield f"{name!r:.60} has the size {record.size!r:.30} and the SHA-256 {record.sha256!r:.70}"
    if not manifest.outputs:
        yield "it names no outputs"
    if manifest.speedup is not None and not manifest.speedup > 0:
        yield f"speedup is {manifest.speedup}"
    for name, value, least in _counts(manifest):
        if not least <= value <= MOST:
            yield f"{name} is {value!r:.30}; expected {least} to {MOST}"
    for text in _texts(manifest):
        yield f"{text!r:.60} has characters that act on a terminal"
    yield from _odd_precision(manifest)


def _counts(manifest: Manifest) -> Iterator[tuple[str, int, int]]:
    """Yield every number that counts something: its name, the number, and the least that it may be."""
    backbone, taken = manifest.backbone, manifest.input
    batch = (taken.batch,) if isinstance(taken.batch, int) else (taken.batch.min, taken.batch.opt, taken.batch.max)
    sizes = taken.sizes
    sides = () if sizes is None else (*sizes.sides[0], *sizes.sides[1], sizes.step)
    for name, values in (
        ("input", (*batch, taken.channels, taken.height, taken.width, *sides)),
        ("image_size", backbone.image_size),
        ("in_channels", (backbone.in_channels,)),
        ("output_stride", (backbone.output_stride,)),
        ("patch_size", (backbone.patch_size or 1,)),
    ):
        yield from ((name, value, 1) for value in values)
    yield "num_classes", backbone.num_classes, 0
    for output in manifest.outputs:
        yield from ((output.name[:40], side, 1) for side in output.shape if isinstance(side, int))
    for level in backbone.levels:
        least = {"index": 0, "channels": 1, "stride": 1, "receptive_field": 0}
        yield from ((f"{level.name[:40]}.{name}", getattr(level, name), number) for name, number in least.items())


def _odd_precision(manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the precision and its budget."""
    settings = manifest.precision_settings
    try:
        parse_precision(manifest.precision, settings)
    except (SpecError, TypeError) as error:
        yield f"precision: {error}"
    for name in ("min_sqnr_db", "min_top1_agreement"):
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            yield f"{name} is {value!r:.30}; expected a number"


def _texts(manifest: Manifest) -> Iterator[str]:
    """Yield the strings of a manifest that hold control characters."""
    stack: list[object] = [msgspec.to_builtins(manifest)]
    while stack:
        value = stack.pop()
        if isinstance(value, str) and not is_printable(value):
            yield value
        elif isinstance(value, dict):
            stack += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            stack += value


def _newer(path: Path, version: int, raw: dict[str, object]) -> str:
    tools = raw.get("tools")
    writer = tools.get("deploykit") if isinstance(tools, dict) else None
    here = own_version().get("deploykit")
    known = isinstance(writer, str) and re.fullmatch(r"[\w.+!-]{1,40}", writer)
    wanted = f"'{DISTRIBUTION}>={writer}'" if known else f"--upgrade {DISTRIBUTION}"
    return (
        f"{path} has schema version {version!r:.40}; this deploykit{f' ({here})' if here else ''} reads up to "
        f"{SCHEMA_VERSION}. Upgrade: pip install {wanted}, or export the bundle with this version."
    )
