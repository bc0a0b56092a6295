"""The sections of a report, in words, tables and drawings, whatever form it is written in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploykit.changes.plans import range_text
from deploykit.parity.interval import wilson
from deploykit.parity.report import LevelParity, ParityReport, decibels
from deploykit.reports.errors import ErrorApart
from deploykit.reports.facts import BundleFacts, Collected

if TYPE_CHECKING:
    from deploykit.export.layers import LayerReport

NOISIEST = 10
SHOWN_FLOAT = 12


@dataclass(frozen=True, kw_only=True)
class Table:
    """``right`` are the positions of the columns of figures."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, what is to be known about what follows, and a table; ``drawing`` names one of `drawings`."""

    title: str
    text: str = ""
    table: Table | None = None
    drawing: str | None = None
    bundle: str | None = None


def sections(collected: Collected) -> Iterator[Section]:
    """Yield the report's sections: all bundles side by side, then each on its own."""
    facts = collected.bundles
    yield _summary(facts)
    yield _levels(facts)
    if collected.errors:
        yield _errors(collected.errors)
    if sum(each.latency_ms is not None for each in facts) > 1:
        text = "Medians of calls in turns on this machine; left and high is better."
        yield Section(title="Latency against accuracy", text=text, drawing="latency")
    for each in facts:
        yield from _own(each)


def _summary(facts: Sequence[BundleFacts]) -> Section:
    columns = ("bundle", "result", "worst output dB", "top-1 (95%)", "ms", "MB", "backbone", "runtime", "precision")
    rows = tuple(_summary_row(each) for each in facts)
    notes = [f"{each.name} did not run here: {each.not_run.rstrip('.')}." for each in facts if each.not_run]
    text = " ".join(["Against torch FP32 on the images that each bundle carries; latency is for one image.", *notes])
    return Section(title="Summary", text=text, table=Table(columns=columns, rows=rows, right=frozenset((2, 3, 4, 5))))


def _summary_row(facts: BundleFacts) -> tuple[str, ...]:
    manifest = facts.side.manifest
    latency = "" if facts.latency_ms is None else f"{facts.latency_ms:.2f}"
    result = {True: "pass", False: "FAIL", None: "not known"}[facts.passed]
    return (
        facts.name,
        result if facts.here is not None or facts.passed is None else f"{result} (when exported)",
        decibels(facts.worst_db),
        _agreement(facts),
        latency,
        f"{facts.side.size / 1e6:.1f}",
        manifest.backbone.name,
        f"{manifest.runtime} {manifest.runtime_version}",
        manifest.precision,
    )


def _agreement(facts: BundleFacts) -> str:
    shares = [level.top1_agreement for level in facts.levels if level.top1_agreement is not None]
    report = facts.here or facts.side.parity
    return str(wilson(round(shares[-1] * report.images), report.images)) if shares and report is not None else ""


def _levels(facts: Sequence[BundleFacts]) -> Section:
    names = list(dict.fromkeys(level.name for each in facts for level in each.levels))
    by_name = [{level.name: level for level in each.levels} for each in facts]
    rows = tuple((name, *(_level_text(levels.get(name)) for levels in by_name)) for name in names)
    columns = ("level", *(each.name for each in facts))
    text = (
        "SQNR in dB, shallow to deep. Figures marked * are those of the export: the engine does not give that level, "
        "or did not run here."
    )
    figures = frozenset(range(1, len(columns)))
    return Section(
        title="Error of each level", text=text, table=Table(columns=columns, rows=rows, right=figures), drawing="levels"
    )


def _level_text(level: LevelParity | None) -> str:
    if level is None:
        return ""
    return f"{decibels(level.sqnr_db)}{'' if level.measured_on == 'engine' else ' *'}{'' if level.passed else ' FAIL'}"


def _errors(errors: Sequence[ErrorApart]) -> Section:
    text = (
        "Conversion: a runtime's FP32 against torch. Quantization: a lower precision against FP32 in one runtime. "
        "Runtime: INT8 of one calibration in two runtimes. On the same images, in dB."
    )
    rows = tuple((each.kind, each.bundle, each.against, each.level, decibels(each.sqnr_db)) for each in errors)
    table = Table(columns=("error", "bundle", "against", "output", "SQNR dB"), rows=rows, right=frozenset((4,)))
    return Section(title="Three errors apart", text=text, table=table)


def _own(facts: BundleFacts) -> Iterator[Section]:
    """Yield what concerns one bundle: its faults, its worst output, its quantizer, and what made and runs it."""
    faults = [(level.name, fault) for level in facts.levels for fault in getattr(level, "faults", ())]
    if faults:
        yield Section(
            title="What is wrong", bundle=facts.name, table=Table(columns=("level", "fault"), rows=(*faults,))
        )
    report = facts.here or facts.side.parity
    if report is not None and report.further:
        yield _corners(facts.name, report)
    if facts.worst is not None:
        text = f"Values of {facts.worst.output} on the bundle's images: torch FP32 and the engine."
        yield Section(title="Worst output", text=text, drawing="worst", bundle=facts.name)
    if facts.layers is not None:
        yield _layers(facts.name, facts.layers)
    if facts.side.plan is not None:
        yield from _quantizer(facts.name, facts.side.plan)
    yield _making(facts)


def _corners(name: str, report: ParityReport) -> Section:
    """Return what an engine for a range of image sizes gives at its corners."""
    rows = []
    for each in report.further:
        worst = min(each.levels, key=lambda level: level.sqnr_db)
        rows.append((each.reference, worst.name, decibels(worst.sqnr_db), "pass" if each.passed else "FAIL"))
    table = Table(columns=("against", "worst output", "SQNR dB", "result"), rows=(*rows,), right=frozenset((2,)))
    text = "The smallest, the largest and the flattest image of the range; all else here is at the best size."
    return Section(title="Image sizes", text=text, table=table, bundle=name)


def _layers(name: str, found: LayerReport) -> Section:
    worst = sorted(found.layers, key=lambda layer: layer.own_db)[:NOISIEST]
    rows = tuple(
        (
            layer.tensor,
            f"{layer.operator} {layer.node}",
            layer.module or "",
            decibels(layer.own_db),
            decibels(layer.whole_db),
            layer.quantizer or "float",
        )
        for layer in worst
    )
    text = (
        f"The largest of {len(found.layers)} layers' errors of their own, against {found.reference}: on the same "
        "input, and with all that they inherit."
    )
    columns = ("layer gives", "node", "torch", "own dB", "whole dB", "reads")
    return Section(
        title="Layers", text=text, table=Table(columns=columns, rows=rows, right=frozenset((3, 4))), bundle=name
    )


def _quantizer(name: str, plan: Mapping[str, Any]) -> Iterator[Section]:
    placement, seen, ranges = plan["placement"], plan.get("statistics", {}), plan["ranges"]
    noisiest = sorted(seen, key=lambda tensor: float(seen[tensor]["sqnr_db"]))[:NOISIEST]
    if noisiest:
        text = (
            f"Calibrated by {plan.get('calibrator')} on {plan.get('images')} images: {len(placement['weights'])} "
            f"weights and {len(ranges)} activations in integers, {len(placement['float_nodes'])} nodes in float. The "
            "activations that lose most by rounding are below. In the drawing the bar is an activation's range, the "
            "thin line what was seen of it, the black one its mean and deviation."
        )
        columns = ("activation", "SQNR of its range dB", "range", "seen", "mean", "deviation")
        rows = tuple(_range_row(tensor, seen[tensor], ranges.get(tensor)) for tensor in noisiest)
        figures = frozenset(range(1, len(columns)))
        yield Section(
            title="What the quantizer did",
            text=text,
            table=Table(columns=columns, rows=rows, right=figures),
            drawing="noisiest",
            bundle=name,
        )
    kept = list(placement["float_nodes"].items())
    if kept:
        more = f" {len(kept) - SHOWN_FLOAT} more stand in the plan." if len(kept) > SHOWN_FLOAT else ""
        rows = tuple((str(node), str(reason)) for node, reason in kept[:SHOWN_FLOAT])
        table = Table(columns=("node", "why it stays in float"), rows=rows)
        yield Section(title="What stays in float", text=more.strip(), table=table, bundle=name)


def _range_row(tensor: str, seen: Mapping[str, float], span: Mapping[str, float] | None) -> tuple[str, ...]:
    figures = [f"{float(seen[key]):.4g}" for key in ("mean", "deviation")]
    chosen = "another tensor's" if span is None else range_text(span)
    return (tensor, f"{float(seen['sqnr_db']):.1f}", chosen, range_text(seen), *figures)


def _worst(errors: list[float]) -> str:
    return f"{decibels(min(errors))} dB" if errors else "not measured"


def _making(facts: BundleFacts) -> Section:
    manifest = facts.side.manifest
    done = ", ".join(f"{name} {count}" for name, count in manifest.fusions.items() if count)
    known = [level.conversion_db for level in facts.levels if level.conversion_db is not None]
    quantization = [level.quantization_db for level in facts.levels if level.quantization_db is not None]
    runtime = [level.runtime_db for level in facts.levels if level.runtime_db is not None]
    rows = {
        "conversion to the runtime, in FP32": f"{decibels(min(known))} dB against torch" if known else "see its levels",
        f"{manifest.precision} against FP32 in this runtime": _worst(quantization),
        "this runtime against the same graph node by node": _worst(runtime),
        "weights": f"{manifest.backbone.weights or 'random'}, digest {manifest.weights_digest[:12]}",
        "input": f"{' x '.join(map(str, manifest.input.shape))} {manifest.input.dtype}",
        "fusion passes that found something": done or "none",
        "runs on": f"{facts.device} (here)"
        if facts.device
        else f"{manifest.seen_on.get('device', 'not run')} (exported)",
        "exported on": ", ".join(f"{name} {text}" for name, text in manifest.seen_on.items()) or "not recorded",
        "tied to": ", ".join(f"{name} {text}" for name, text in manifest.requires.items()) or "the runtime's version",
        "compiler": ", ".join(f"{name} {text}" for name, text in manifest.compiler.items()) or "no choice",
        "times as fast as FP32 when exported": "not timed" if manifest.speedup is None else f"{manifest.speedup:.2f}",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    table = Table(columns=("what", "this bundle"), rows=tuple(rows.items()))
    return Section(title="How it was made and where it runs", table=table, bundle=facts.name)
