"""``deploykit list``: every backbone with its size and work, and the runtimes with their precisions."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.output import JsonFlag, show, show_json, stderr_console, table
from deploykit.errors import SpecError, nearest
from deploykit.optional import installed_version, require

if TYPE_CHECKING:
    from deploykit.store import Address

EXAMPLE = "Example: deploykit list --family resnet --filter '*50*'"

CONVENTION = (
    "GMACs: billions of multiply-accumulates of one image in convolutions and matrix products, at the image size "
    "shown, for logits. timm calls this GMACs, fvcore and papers often GFLOPs; as single operations it is twice that."
)


@dataclass(frozen=True, kw_only=True)
class BackboneRow:
    """One variant; ``image_size`` is (height, width) and ``strides`` by level name, both in pixels."""

    name: str
    family: str
    parameters: int
    gmacs: float
    image_size: tuple[int, int]
    strides: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class RuntimeRow:
    """A runtime, what it can compute in, and its installed version; None: not installed."""

    runtime: str
    precisions: tuple[str, ...]
    version: str | None


def list_backbones(
    family: Annotated[str | None, typer.Option("--family", metavar="NAME", help="Only this family.")] = None,
    pattern: Annotated[
        str | None, typer.Option("--filter", metavar="PATTERN", help="Only names that match, with * and ?.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """List the backbones with parameters, work and levels, and the runtimes with their precisions."""
    require("torch")
    names = _chosen(family, pattern)
    rows = list(_measured(names))
    runtimes = list(_runtimes())
    if json:
        show_json({"convention": CONVENTION, "backbones": rows, "runtimes": runtimes})
        return
    columns = ("name", "family", "parameters M", "GMACs", "image px", "levels: strides px")
    show(table(columns, map(_cells, rows), right=("parameters M", "GMACs")), CONVENTION, "")
    engines = ([row.runtime, ", ".join(row.precisions), row.version or "not installed"] for row in runtimes)
    show(table(("runtime", "precisions", "installed"), engines))
    show(f"Next: deploykit export {rows[0].name} --runtime {EVALUATOR}")


def _cells(row: BackboneRow) -> list[str]:
    height, width = row.image_size
    groups: dict[int, list[str]] = {}
    for name, stride in row.strides.items():
        groups.setdefault(stride, []).append(name)
    levels = ", ".join(
        f"{names[0]} {stride}" if len(names) == 1 else f"{names[0]}..{names[-1]} {stride}"
        for stride, names in groups.items()
    )
    return [row.name, row.family, f"{row.parameters / 1e6:.2f}", f"{row.gmacs:.3g}", f"{height}x{width}", levels]


def _chosen(family: str | None, pattern: str | None) -> dict[str, str]:
    """Return the names asked for, each with its family.

    Raises:
        SpecError: no such family, or nothing matches.
    """
    from deploykit.backbones.registry import backbone_class, backbone_names

    families = {name: backbone_class(name).family for name in backbone_names()}
    if family is not None and family not in families.values():
        raise SpecError(f"unknown family {family!r}. {nearest(family, families.values())}")
    of_family = {name: own for name, own in families.items() if family in (None, own)}
    chosen = {name: own for name, own in of_family.items() if fnmatch.fnmatchcase(name, pattern or "*")}
    if not chosen:
        raise SpecError(f"no backbone matches {pattern!r}. {nearest((pattern or '').strip('*?'), of_family)}")
    return chosen


def _runtimes() -> Iterator[RuntimeRow]:
    from deploykit.backends.table import backend_names, load_backend

    for backend in map(load_backend, backend_names()):
        yield RuntimeRow(runtime=backend.name, precisions=backend.precisions, version=backend.installed_version())


def _measured(names: dict[str, str]) -> Iterator[BackboneRow]:
    """Yield the row of each name: remembered from an earlier call of the same code, or measured now."""
    import msgspec

    from deploykit.store import Store

    store, memory = Store(), _memory()
    known: dict[str, BackboneRow] = {}
    with suppress(msgspec.MsgspecError):
        known = msgspec.json.decode(store.load(memory) or b"{}", type=dict[str, BackboneRow])
    absent = [name for name in names if name not in known]
    for name in _shown_progress(absent):
        known[name] = measure(name)
    if absent:
        store.save(memory, msgspec.json.encode(known))
    yield from (known[name] for name in names)


def _memory() -> Address:
    """Return where rows are kept: it changes with the code of the backbones and with torch."""
    import deploykit.backbones
    from deploykit.store import address

    digest = hashlib.sha256()
    for folder in (Path(deploykit.backbones.__path__[0]), Path(__file__).parent):
        for source in sorted(folder.glob("*.py")):
            digest.update(hashlib.sha256(source.read_bytes()).digest())
    parts = {"code": digest.hexdigest(), "torch": installed_version("torch")}
    return address("list", parts, title="sizes and work of the backbones")


def _shown_progress(names: list[str]) -> Iterable[str]:
    console = stderr_console()
    if not console.is_terminal or not names:
        return names
    from rich.progress import track

    return track(names, "counting operations", console=console, transient=True)


def measure(name: str) -> BackboneRow:
    """Build a variant on torch's meta device, where nothing is computed, and count.

    Parameters are those of all options at their defaults; the count is `CONVENTION`'s.
    """
    from deploykit.backbones.base import BackboneOptions
    from deploykit.cli.export_check import shape_of
    from deploykit.cli.macs import count_macs

    backbone = shape_of(name, BackboneOptions())
    height, width = backbone.spec.image_size
    return BackboneRow(
        name=name,
        family=backbone.family,
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        gmacs=count_macs(backbone, (1, backbone.spec.in_channels, height, width)) / 1e9,
        image_size=(height, width),
        strides={level.name: level.stride for level in backbone.all_levels},
    )
