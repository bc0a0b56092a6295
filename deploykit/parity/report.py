"""The parity report: every level's figures against its budget, as it is stored in a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from deploykit.errors import BundleError, ParityError
from deploykit.optional import require
from deploykit.parity.interval import Interval, wilson
from deploykit.printable import printable

if TYPE_CHECKING:
    from rich.table import Table

PARITY_FILE = "parity.json"

MAX_SQNR_DB = 300.0
"""JSON has no infinity: equal arrays are stored as 300 dB, and a broken level as -300 dB."""

MAX_RELATIVE_L2 = 1e15
"""The relative L2 of -300 dB, stored for a broken level."""

NEAR_DB = 1.0
"""A level that passes by less than this is said to be near its budget."""

MAX_MAX_ABS = 3.4028234663852886e38
"""float32's largest value, stored as the max-abs of a level with NaN or infinity."""

ErrorKind: TypeAlias = Literal["conversion", "quantization", "runtime"]
ErrorsApart: TypeAlias = Mapping[ErrorKind, Mapping[str, float]]
"""In dB, by kind and level."""

ELSEWHERE = "engine, on another machine"
"""Where the levels of an engine were measured that is for another machine than the one that ran it."""

_SIMULATED = "engine, in "


def simulated(simulator: str) -> str:
    """Return where the levels of an engine were measured that ran in a simulator of its device."""
    return f"{_SIMULATED}{simulator}"


@dataclass(frozen=True, kw_only=True)
class LevelParity:
    """The figures of one feature level, of the logits, or of the embedding.

    ``sqnr_db`` is in dB, capped at +-`MAX_SQNR_DB`; ``top1_agreement`` is from 0 to 1, and None
    where there are no logits. ``measured_on`` says what ran: ``engine``, or another runtime that
    ran the same graph where the engine cannot run here. ``conversion_db`` is that of the runtime's
    FP32 engine against torch, where the export built one beside this precision: what ``sqnr_db``
    has less is the precision's. ``quantization_db`` is the engine against that FP32 engine, and
    ``runtime_db`` against the same graph node by node, on the same few images. ``agreement_db`` is in dB
    against what the engine itself gave when it was exported, ``min_agreement_db`` what is needed, and
    ``faults`` say in words what else differs; None: the bundle does not carry that.
    """

    name: str
    sqnr_db: float
    cosine: float
    relative_l2: float
    max_abs: float
    top1_agreement: float | None = None
    measured_on: str = "engine"
    conversion_db: float | None = None
    quantization_db: float | None = None
    runtime_db: float | None = None
    agreement_db: float | None = None
    min_agreement_db: float | None = None
    faults: tuple[str, ...] = ()
    passed: bool


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What was compared with what, on how many images, within which budget, and every level.

    ``min_sqnr_db`` is in dB and holds for every level; ``min_top1_agreement`` is from 0 to 1 and
    holds for the logits; None: no such gate. At -`MAX_SQNR_DB` a level is judged by its faults
    alone. ``further`` are comparisons with another reference.
    """

    reference: str = "torch fp32"
    runtime: str
    runtime_version: str
    precision: str
    images: int
    min_sqnr_db: float
    min_top1_agreement: float | None = None
    levels: tuple[LevelParity, ...]
    further: tuple[ParityReport, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every level is within the budget; a report of no levels or images never passes."""
        own = bool(self.levels) and self.images > 0 and all(level.passed for level in self.levels)
        return own and all(report.passed for report in self.further)

    @property
    def is_simulated(self) -> bool:
        """Whether the engine ran in a simulator of its device."""
        return any(level.measured_on.startswith(_SIMULATED) for level in self.levels)

    def failures(self) -> tuple[LevelParity, ...]:
        """Return the levels outside the budget, shallow to deep."""
        own = tuple(level for level in self.levels if not level.passed)
        return own + tuple(level for report in self.further for level in report.failures())

    def raise_for_failures(self) -> None:
        """Do nothing when `passed`.

        Raises:
            ParityError: names every failing level with its figure and budget.
        """
        if self.passed:
            return
        if not self.levels or self.images < 1:
            raise ParityError(
                f"the parity report covers {len(self.levels)} levels and {self.images} images; expected at least one "
                "of each. Compare again with images."
            )
        text = "\n".join(report._message() for report in (self, *self.further) if not report.passed)
        raise ParityError(text, levels={level.name: level.sqnr_db for level in self.levels})

    def _message(self) -> str:
        failures = [level for level in self.levels if not level.passed]
        lines = "".join(f"\n  {self._why(level)}" for level in failures)
        return (
            f"{self.runtime} {self.runtime_version} at {self.precision} is outside its budget against "
            f"{self.reference} on {self.images} images, in {len(failures)} of {len(self.levels)} levels:"
            f"{lines}\n{self._remedy(failures)}"
        )

    def save(self, path: Path) -> None:
        """Write the report as JSON.

        Raises:
            BundleError: the file cannot be written.
        """
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        except OSError as error:
            raise BundleError(f"the parity report {path} cannot be written: {error}.") from error

    @classmethod
    def load(cls, source: Path | bytes) -> ParityReport:
        """Read what `save` wrote, from the file or from its content.

        Raises:
            BundleError: the file is missing, unreadable, or not a parity report.
        """
        what = f" {source}" if isinstance(source, Path) else ""
        try:
            return msgspec.json.decode(source if isinstance(source, bytes) else source.read_bytes(), type=cls)
        except OSError as error:
            raise BundleError(f"the parity report{what} cannot be read: {error}. Export the bundle again.") from error
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BundleError(
                f"the file{what} is not a parity report ({error}). The bundle is damaged: copy or export it again."
            ) from error

    def render(self) -> Table:
        """Return a table for a terminal, one row a level."""
        require("rich")
        from rich.table import Table
        from rich.text import Text

        title = f"{self.runtime} {self.runtime_version} {self.precision} against {self.reference}"
        table = Table(
            title=Text(printable(title), style="italic"),
            caption=f"{self.images} images{self._budget()}{self._interval()}{self._apart()}",
        )
        elsewhere = any(level.measured_on != "engine" for level in self.levels)
        agreement = any(level.top1_agreement is not None for level in self.levels)
        export = any(level.agreement_db is not None for level in self.levels)
        table.add_column("level")
        headings = ("SQNR dB", "cosine", "relative L2", "max-abs", *(["top-1"] if agreement else []))
        for heading in (*headings, *(["as exported dB"] if export else [])):
            table.add_column(heading, justify="right")
        for heading in (*(["measured on"] if elsewhere else []), "result"):
            table.add_column(heading)
        for level in self.levels:
            row = [printable(level.name), decibels(level.sqnr_db), f"{level.cosine:.6f}"]
            row += [f"{level.relative_l2:.3g}", f"{level.max_abs:.3g}"]
            row += [_share(level.top1_agreement)] if agreement else []
            row += [decibels(level.agreement_db)] if export else []
            row += [printable(level.measured_on)] if elsewhere else []
            verdict = Text("pass", style="green") if level.passed else Text("FAIL", style="red")
            table.add_row(*map(Text, row), verdict)
        return table

    def with_errors(self, errors: ErrorsApart) -> ParityReport:
        """Return the report with its errors apart, in dB by level; of a kind that is not given, it keeps its own."""
        conversion, quantization, runtime = (errors.get(kind, {}) for kind in ("conversion", "quantization", "runtime"))
        levels = tuple(
            replace(
                level,
                conversion_db=conversion.get(level.name, level.conversion_db),
                quantization_db=quantization.get(level.name, level.quantization_db),
                runtime_db=runtime.get(level.name, level.runtime_db),
            )
            for level in self.levels
        )
        return replace(self, levels=levels)

    def errors(self) -> dict[ErrorKind, dict[str, float]]:
        """Return the errors apart, in dB by kind and level, where they are known."""
        kinds: dict[ErrorKind, dict[str, float | None]] = {
            "conversion": {level.name: level.conversion_db for level in self.levels},
            "quantization": {level.name: level.quantization_db for level in self.levels},
            "runtime": {level.name: level.runtime_db for level in self.levels},
        }
        return {
            kind: {name: value for name, value in found.items() if value is not None} for kind, found in kinds.items()
        }

    def _apart(self) -> str:
        whats: dict[ErrorKind, str] = {
            "conversion": "of this the conversion to the runtime, in fp32",
            "quantization": f"{self.precision} against fp32 in this runtime",
            "runtime": "this runtime against the same graph node by node",
        }
        lines = []
        for kind, known in self.errors().items():
            if known:
                name = min(known, key=lambda level: known[level])
                lines.append(f"\n{whats[kind]}: {name} {decibels(known[name])} dB")
        return "".join(lines)

    def notes(self) -> list[str]:
        """Say which levels passed by so little that other images could decide otherwise."""
        found = []
        for level in (each for each in self.levels if each.passed):
            if level.sqnr_db < self.min_sqnr_db + NEAR_DB:
                found.append(f"{level.name}: {level.sqnr_db:.1f} dB, near its budget of {self.min_sqnr_db:g} dB")
            gate, agreement = self.min_top1_agreement, level.top1_agreement
            if gate is not None and agreement is not None and self._of(agreement).low < gate:
                found.append(
                    f"{level.name}: top-1 agreement {self._of(agreement)} on {self.images} images, of {gate:.1%}"
                )
        return found + [note for report in self.further for note in report.notes()]

    def further_lines(self) -> list[str]:
        """Return one line for each further comparison: its reference, its worst output in dB, and the result."""
        lines = []
        for report in self.further:
            worst = min(report.levels, key=lambda level: level.sqnr_db)
            figure = f"{worst.name} {decibels(worst.sqnr_db)} dB"
            lines.append(f"against {report.reference}: {figure}, {'pass' if report.passed else 'FAIL'}")
        return lines

    def _of(self, agreement: float) -> Interval:
        return wilson(round(agreement * self.images), self.images)

    def _interval(self) -> str:
        shares = [level.top1_agreement for level in self.levels if level.top1_agreement is not None]
        if not shares or self.images < 1:
            return ""
        found = self._of(shares[-1])
        return f"\n95% interval of top-1: {found.low:.1%} to {found.high:.1%}"

    def _budget(self) -> str:
        if self.min_sqnr_db <= -MAX_SQNR_DB:
            return ""
        gate = "" if self.min_top1_agreement is None else f", top-1 agreement {self.min_top1_agreement:.1%}"
        return f"; budget {self.min_sqnr_db:g} dB{gate}"

    def _why(self, level: LevelParity) -> str:
        parts = []
        if level.sqnr_db <= -MAX_SQNR_DB:
            parts.append("NaN, infinity, or values where the reference has none")
        elif level.sqnr_db < self.min_sqnr_db:
            parts.append(f"{level.sqnr_db:.1f} dB; budget at least {self.min_sqnr_db:g} dB")
        gate, agreement = self.min_top1_agreement, level.top1_agreement
        if gate is not None and agreement is not None and agreement < gate:
            parts.append(f"top-1 agreement {agreement:.1%}; budget at least {gate:.1%}")
        parts += level.faults
        return f"{level.name}: {', '.join(parts) or 'marked as failed'}"

    def _remedy(self, failures: list[LevelParity]) -> str:
        named = bool(failures) and all(level.faults and level.sqnr_db >= self.min_sqnr_db for level in failures)
        if named and any(level.agreement_db is None for level in failures):
            return "What differs is named above. Verify each of the two by itself to see which one is wrong."
        if named:
            return (
                "The engine does not give what it gave when it was exported. Copy the bundle again from its source, or "
                "export it again; on a processor or a runtime version that computes otherwise, export it there."
            )
        if self.precision == "int8":
            return (
                "Calibrate with more images like those it will see, try another calibrator, keep the worst layers "
                "in float, or lower min_sqnr_db if the task's own accuracy holds."
            )
        if self.precision == "fp32":
            return (
                "Look for the first failing level, which is where the conversion went wrong, or lower min_sqnr_db if "
                "the task's own accuracy holds."
            )
        return (
            "Look for the first failing level, which is where the conversion went wrong; export at fp32 to tell a "
            "precision's loss from a wrong graph, or lower min_sqnr_db if the task's own accuracy holds."
        )


def capped(value: float) -> float:
    """Return an SQNR in dB as reports have it, within +-`MAX_SQNR_DB`: infinity is no JSON."""
    return min(max(float(value), -MAX_SQNR_DB), MAX_SQNR_DB)  # in this order NaN stays NaN


def decibels(value: float | None) -> str:
    """Return an SQNR as text; empty for None."""
    if value is None:
        return ""
    if abs(value) >= MAX_SQNR_DB:
        return "exact" if value > 0 else "broken"
    return f"{value:.1f}"


def with_unit(value: float) -> str:
    """Return an SQNR as text with its unit, where it is a number."""
    text = decibels(value)
    return text if abs(value) >= MAX_SQNR_DB else f"{text} dB"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
