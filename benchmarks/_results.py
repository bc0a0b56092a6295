"""What every benchmark says of itself: options that all have, the machine, results as JSON, pictures."""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.optional import installed_version, require
from deploykit.processor import this_processor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("torch", "onnxruntime", "openvino", "nncf", "timm")
THEMES = {
    "light": {"ink": "#102030", "grid": "#c0d0e0", "ground": "#ffffff"},
    "dark": {"ink": "#e6edf3", "grid": "#3d4650", "ground": "#0d1117"},
}
"""The colours of a picture's text, grid and ground, which GitHub's two themes have."""
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#7d73d3")
"""Okabe and Ito's colours, which people who do not tell red from green tell apart."""


def parser(description: str | None, *, plot: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has; ``plot`` says what is drawn where something is."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="fewer networks, images and rounds: minutes, not hours")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure and the machine to a file too")
    if plot is not None:
        made.add_argument(
            "--plot", type=Path, metavar="FILE", help=f"draw {plot} (.svg or .png), a light and a dark one"
        )
    return made


def silence() -> None:
    """Let no warning or log line stand between the rows of a table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def machine() -> dict[str, Any]:
    """Describe what the figures come from; ``load`` is that of the last minute, this process included."""
    processor = this_processor()
    return {
        "processor": processor.model,
        "cores": processor.cores,
        "int8_instructions": list(processor.int8),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {name: installed_version(name) or "absent" for name in PACKAGES},
    }


def machine_line() -> str:
    """Return the machine in one line, for the head of a table."""
    here = machine()
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    instructions = ", ".join(here["int8_instructions"]) or "none known"
    return (
        f"{here['processor']}, {here['cores']} cores, INT8 instructions: {instructions}; "
        f"load average {here['load']}; {versions}"
    )


def save(path: Path | None, **results: Sequence[Any] | Mapping[str, Any]) -> None:
    """Write results and the machine as JSON, where a file is named."""
    if path is None:
        return
    plain = {name: _plain(value) for name, value in results.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **plain}, indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def check_plot(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Refuse a picture that cannot be drawn, before hours of work."""
    if path is None:
        return
    if path.suffix not in (".svg", ".png"):
        parser.error(f"--plot {path}: expected a name that ends in .svg or .png.")
    require("matplotlib.figure")


def themed(theme: str, size: tuple[float, float], columns: int) -> Figure:
    """Return a figure with ``columns`` axes in the colours of a theme; ``size`` in inches."""
    figure: Figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    colours = THEMES[theme]
    figure.set_facecolor(colours["ground"])
    for axes in figure.subplots(1, columns, squeeze=False).flat:
        axes.set_facecolor(colours["ground"])
        axes.grid(linewidth=0.5, color=colours["grid"])
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(colours["ink"])
        axes.tick_params(colors=colours["ink"], which="both", labelsize=8)
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            label.set_color(colours["ink"])
    return figure


def write_picture(figure: Figure, path: Path, theme: str) -> Path:
    """Write a themed picture; the dark one of ``NAME.svg`` is ``NAME-dark.svg``. Equal figures give equal bytes."""
    target = path if theme == "light" else path.with_name(f"{path.stem}-dark{path.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with require("matplotlib").rc_context(
        {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.family": "sans-serif"}
    ):
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(target, dpi=150, facecolor=figure.get_facecolor(), metadata=metadata)
    return target
