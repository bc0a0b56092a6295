"""``deploykit inspect``: what a bundle says of itself, as a page; needs no runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deploykit.backends.table import EVALUATOR
from deploykit.bundle_files import PLAN_FILE
from deploykit.cli.output import BundleArgument, JsonFlag, input_text, show, show_json, size_text, table
from deploykit.errors import BundleError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from deploykit.backends.tuning import Tuning
    from deploykit.bundle import Manifest
    from deploykit.parity.report import ParityReport
    from deploykit.threads import Hint

EXAMPLE = f"Example: deploykit inspect resnet18-{EVALUATOR}-fp32"

SHOWN_FLOAT_NODES = 12
SHOWN_RANGES = 3

Section: TypeAlias = tuple[str, list[tuple[str, str]]]

_STATUS = {
    "built": "built, never executed",
    "executed": "executed, and not all of its outputs are within the budget",
    "parity_checked": "executed, every output within the budget",
}


@dataclass(frozen=True, kw_only=True)
class QuantizationSummary:
    """``float_nodes`` maps each weighted node that stays in float to the reason.

    ``noisiest`` are the activations that lose most by rounding, each with the SQNR of its range in dB.
    """

    calibrator: str
    images: int
    integer_weights: int
    reduce_range: bool
    activation_ranges: int
    float_nodes: dict[str, str]
    noisiest: dict[str, float]


def inspect(bundle: BundleArgument, json: JsonFlag = False) -> None:
    """Show a bundle's backbone, input, engine, precision, files, stored parity and quantization.

    Every file is checked against its digest first; the runtime need not be installed.
    """
    from deploykit.bundle import open_bundle
    from deploykit.parity.report import PARITY_FILE, ParityReport
    from deploykit.shipping.transfer import pulled_from

    folder = Path(bundle)
    manifest = open_bundle(folder)
    parity = ParityReport.load(folder / PARITY_FILE) if PARITY_FILE in manifest.files else None
    quantization = read_quantization(folder / PLAN_FILE) if PLAN_FILE in manifest.files else None
    source, tunings = pulled_from(folder), _tunings(manifest)
    if json:
        parts = {"manifest": manifest, "parity": parity, "quantization": quantization}
        show_json({"bundle": bundle, **parts, "pulled_from": source, "tuned_here": tunings})
        return
    for title, rows in _sections(manifest, quantization):
        width = max(len(name) for name, _ in rows)
        show(title, *(f"  {name:<{width}}  {value}" for name, value in rows), "")
    _show_levels(manifest)
    if parity is not None:
        show(_as_stored(parity), *parity.further_lines(), "")
    if source is not None:
        show(f"Pulled from {source.address}, revision {source.revision}.")
    for each in tunings:
        show(f"Tuned here: opened with {each}.")
    show(f"Next: deploykit verify {bundle}")


def _tunings(manifest: Manifest) -> list[Tuning]:
    """Return what `deploykit tune` measured best for the engine on this machine."""
    from deploykit.backends.table import BACKENDS, backend_of
    from deploykit.backends.tuning import remembered

    if manifest.runtime not in BACKENDS:
        return []
    hints: tuple[Hint, ...] = ("latency", "throughput")
    found = [remembered(manifest, backend_of(manifest), "auto", hint) for hint in hints]
    return [each for each in found if each is not None]


def read_quantization(path: Path) -> QuantizationSummary:
    """Return the plan's figures, read without onnx, which the plan's own class needs.

    Raises:
        BundleError: not a quantization plan.
    """
    import msgspec

    try:
        plan: Any = msgspec.json.decode(path.read_bytes())
        placement = plan["placement"]
        noise = {name: float(seen["sqnr_db"]) for name, seen in plan.get("statistics", {}).items()}
        return QuantizationSummary(
            calibrator=str(plan["calibrator"]),
            images=int(plan["images"]),
            integer_weights=len(placement["weights"]),
            reduce_range=bool(plan.get("reduce_range")),
            activation_ranges=len(plan["ranges"]),
            float_nodes=dict(placement["float_nodes"]),
            noisiest=dict(sorted(noise.items(), key=lambda entry: entry[1])[:SHOWN_RANGES]),
        )
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a quantization plan ({error!r}). Export the bundle again.") from error


def _sections(manifest: Manifest, quantization: QuantizationSummary | None) -> Iterator[Section]:
    backbone, spec, how = manifest.backbone, manifest.input, manifest.input.preprocessing
    inside = ", inside the engine" if spec.embeds_preprocessing else ""
    yield (
        "Backbone",
        [
            ("name", f"{backbone.name} ({backbone.family})"),
            ("weights", f"{backbone.weights or 'random'}, digest {manifest.weights_digest[:12]}"),
            ("returns", "feature maps by level" if backbone.features_only else backbone.head_name),
            ("output stride", f"{backbone.output_stride} px"),
            ("labels", backbone.label_set or "none"),
        ],
    )
    yield (
        "Input",
        [
            (spec.name, input_text(spec)),
            ("mean, std", f"{_figures(how.mean)}; {_figures(how.std)} (of RGB in 0 to 1){inside}"),
            ("resize", f"{how.interpolation}, crop {how.crop_pct:g}, {how.crop_mode}"),
        ],
    )
    yield (
        "Engine",
        [
            ("runtime", f"{manifest.runtime} {manifest.runtime_version}"),
            ("status", _STATUS[manifest.status]),
            ("seen on", _pairs(manifest.seen_on) or "not recorded"),
            ("precision", f"{manifest.precision}: {_pairs(manifest.precision_settings)}"),
            ("target", manifest.target or "the runtime's own"),
            ("tied to", _pairs(manifest.requires) or "nothing beyond the runtime's version"),
            ("fusions", _pairs(manifest.fusions) or "none"),
            ("compiler", _pairs(manifest.compiler) or "no choice"),
            ("made with", _pairs(manifest.tools)),
        ],
    )
    if quantization is not None:
        yield "Quantization", _quantization_rows(quantization)
    files = [(name, size_text(record.size)) for name, record in manifest.files.items()]
    yield "Files, each equal to its digest", files


def _quantization_rows(plan: QuantizationSummary) -> list[tuple[str, str]]:
    reduced = " (reduced, for processors without VNNI)" if plan.reduce_range else ""
    rows = [
        ("calibrator", f"{plan.calibrator}, {plan.images} images"),
        ("integers", f"{plan.integer_weights} weights{reduced}, {plan.activation_ranges} activation ranges"),
        ("float", f"{len(plan.float_nodes)} nodes"),
    ]
    rows += [("", f"{node}: {reason}") for node, reason in list(plan.float_nodes.items())[:SHOWN_FLOAT_NODES]]
    if len(plan.float_nodes) > SHOWN_FLOAT_NODES:
        rows.append(("", f"and {len(plan.float_nodes) - SHOWN_FLOAT_NODES} more: see {PLAN_FILE}"))
    if plan.noisiest:
        rows.append(("noisiest", ", ".join(f"{name} {noise:.1f} dB" for name, noise in plan.noisiest.items())))
    return rows


def _show_levels(manifest: Manifest) -> None:
    returned = {output.name: output.shape for output in manifest.outputs}
    levels = {level.name: level for level in manifest.backbone.levels}
    rows = []
    for name in dict.fromkeys((*levels, *returned)):
        level = levels.get(name)
        figures = (level.index, level.channels, level.stride, level.receptive_field or "all") if level else ("",) * 4
        shape = " x ".join(map(str, returned[name])) if name in returned else "not returned"
        rows.append([name, *map(str, figures), shape])
    columns = ("output", "index", "channels", "stride px", "receptive field px", "shape")
    show(table(columns, rows, right=columns[1:5], title="Levels and outputs"), "")


def _as_stored(parity: ParityReport) -> RenderableType:
    from rich.text import Text

    made = parity.render()
    made.title = Text(f"Parity when exported: {made.title}", style="italic")
    return made


def _pairs(mapping: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in mapping.items() if value is not None)


def _figures(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
