"""The drawings of a report, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from deploykit.optional import require
from deploykit.reports.facts import BundleFacts
from deploykit.reports.sections import NOISIEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID = "#102030", "#c0d0e0"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#5d4fb3")
"""Okabe and Ito's colours, which people who do not tell red from green tell apart; the page may replace them."""

MARKERS = "osD^vPX*"
MOST_DB = 120.0
"""Levels that agree better are drawn here."""

WIDTH, HEIGHT = 5.0, 3.1
"""Inches at 72 pixels: drawn for a phone, since a page scales drawings down and never up."""


def draw_all(facts: Sequence[BundleFacts]) -> dict[tuple[str, str | None], str]:
    """Return every drawing that the facts allow, by its name and its bundle.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    drawn: dict[tuple[str, str | None], str] = {("levels", None): _draw("levels", partial(_levels, facts=facts))}
    if sum(each.latency_ms is not None for each in facts) > 1:
        drawn["latency", None] = _draw("latency", partial(_latency, facts=facts))
    for place, each in enumerate(facts):
        if each.worst is not None:
            drawn["worst", each.name] = _draw(f"worst{place}", partial(_worst, facts=each))
        if each.side.plan is not None and each.side.plan.get("statistics"):
            drawn["noisiest", each.name] = _draw(f"noisiest{place}", partial(_noisiest, facts=each))
    return drawn


def _draw(name: str, fill: Callable[[Axes], None]) -> str:
    """Draw into SVG, the same bytes each time; ``name`` makes its internal references unique in the page."""
    matplotlib = require("matplotlib")
    figures = require("matplotlib.figure")
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        fill(axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _tidy(written.getvalue())


def _tidy(svg: str) -> str:
    """Cut what stands before the drawing, the metadata and ids that nothing uses; take the colours from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'^<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', svg)
    for place, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--s{place})")
    return svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)").strip()


def _levels(axes: Axes, facts: Sequence[BundleFacts]) -> None:
    names = list(dict.fromkeys(level.name for each in facts for level in each.levels))
    for place, each in enumerate(facts):
        found = {level.name: min(MOST_DB, max(-20.0, level.sqnr_db)) for level in each.levels}
        where = [position for position, name in enumerate(names) if name in found]
        axes.plot(where, [found[names[at]] for at in where], label=each.name, linewidth=1.4, **_series(place))
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 5 else 0)
    axes.set_ylabel("SQNR, dB")
    _legend(axes, len(facts))


def _latency(axes: Axes, facts: Sequence[BundleFacts]) -> None:
    for place, each in enumerate(facts):
        if each.latency_ms is not None and each.worst_db is not None:
            figure = min(MOST_DB, max(-20.0, each.worst_db))
            axes.plot([each.latency_ms], [figure], label=each.name, linestyle="", **_series(place))
    axes.set_xlabel("ms an image")
    axes.set_ylabel("SQNR of the worst output, dB")
    axes.margins(0.15)
    _legend(axes, len(facts))


def _worst(axes: Axes, facts: BundleFacts) -> None:
    found = facts.worst
    if found is None:
        return
    for place, (label, counts) in enumerate(
        (("torch FP32", found.torch), (facts.side.manifest.precision, found.engine))
    ):
        axes.stairs(
            counts, found.edges, label=label, color=SERIES[place], linewidth=1.4, linestyle="-" if place else "--"
        )
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xlabel(f"value of {found.output}")
    axes.set_ylabel("how often")
    _legend(axes, 2)


def _noisiest(axes: Axes, facts: BundleFacts) -> None:
    """Draw what was seen of the noisiest activations, as a share of the range that they got."""
    seen, ranges = (facts.side.plan or {})["statistics"], (facts.side.plan or {})["ranges"]
    chosen = sorted((name for name in seen if name in ranges), key=lambda name: float(seen[name]["sqnr_db"]))
    for place, name in enumerate(chosen[:NOISIEST]):
        span, low, high = ranges[name], float(seen[name]["low"]), float(seen[name]["high"])
        unit = max(abs(float(span["low"])), abs(float(span["high"]))) or 1.0
        axes.plot([low / unit, high / unit], [place, place], color=SERIES[1], linewidth=1.2)
        edges = [float(span["low"]) / unit, float(span["high"]) / unit]
        axes.plot(edges, [place, place], color=SERIES[0], linewidth=5, solid_capstyle="butt")
        middle, spread = float(seen[name]["mean"]) / unit, float(seen[name]["deviation"]) / unit
        axes.plot([middle - spread, middle + spread], [place, place], color=INK, linewidth=1.6)
    axes.set_yticks(range(len(chosen[:NOISIEST])), chosen[:NOISIEST])
    axes.invert_yaxis()
    axes.set_xlabel("share of the range")


def _series(place: int) -> dict[str, Any]:
    return {"color": SERIES[place % len(SERIES)], "marker": MARKERS[place % len(MARKERS)], "markersize": 5}


def _legend(axes: Axes, count: int) -> None:
    """Put the legend above the drawing, where it hides nothing."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=1 if count > 2 else 2, fontsize=9.5, borderaxespad=0.2
        )
