"""Mixed precision: the fastest set of nodes to keep in float so that an INT8 engine meets its budget.

Nodes are ordered by the noise that keeping each in float removes, for what it costs. The search
doubles the number of float nodes until the budget is met, bisects back to the fewest, and then takes
out again what turns out not to be needed. Every candidate is a real engine, measured as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import onnx_ir as ir

from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.sensitivity import Sensitivity
from deploykit.errors import CalibrationError
from deploykit.optional import require
from deploykit.store import Address, Store, address

if TYPE_CHECKING:
    from rich.table import Table

MOST_REFINEMENTS = 6
"""How many candidates may be built to take single nodes back into the integers."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one engine gave.

    ``sqnr_db`` is that of its worst level, in dB against torch FP32; ``speedup`` is the FP32 engine's
    time over its own, timed in turns, None where its device is not here; ``metric`` is the user's own.
    """

    sqnr_db: float
    top1_agreement: float | None = None
    metric: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchBudget:
    """What a candidate must give; ``min_metric`` is a floor under the user's own metric."""

    min_sqnr_db: float
    min_top1_agreement: float | None = None
    min_metric: float | None = None

    def met_by(self, found: Measured) -> bool:
        """Return whether every figure that is asked for is reached."""
        gates = (
            (self.min_sqnr_db, found.sqnr_db),
            (self.min_top1_agreement, found.top1_agreement),
            (self.min_metric, found.metric),
        )
        return all(gate is None or (figure is not None and figure >= gate) for gate, figure in gates)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A set of nodes in float, and what the engine with them gave."""

    float_nodes: tuple[str, ...]
    measured: Measured
    within_budget: bool

    @property
    def summary(self) -> str:
        """One line for a progress report."""
        speed = "" if self.measured.speedup is None else f", FP32/this {self.measured.speedup:.2f}"
        gate = "within the budget" if self.within_budget else "outside the budget"
        return f"{len(self.float_nodes)} layers in float: {self.measured.sqnr_db:.1f} dB{speed}, {gate}"


@dataclass(frozen=True, kw_only=True)
class SearchReport:
    """All candidates in the order of their number of float nodes, and which was taken.

    ``cost_from`` says what the order of the nodes was made from: the runtime's ``profile``, or ``MACs``.
    """

    budget: SearchBudget
    cost_from: str
    candidates: tuple[Candidate, ...]
    chosen: int

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """The candidates that no other beats both in speed and in dB; all of them where nothing was timed."""
        return tuple(one for one in self.candidates if not any(_beats(other, one) for other in self.candidates))

    def render(self) -> Table:
        """Return a table for a terminal, one row a candidate."""
        require("rich")
        from rich.table import Table

        table = Table(
            title="Mixed precision: speed against accuracy",
            caption=f"budget {self._budget()}; layers ordered by noise per {self.cost_from}; "
            "* on the frontier; > taken; times from one run",
        )
        for heading in ("", "float layers", "worst level dB", "top-1", "metric", "FP32/this"):
            table.add_column(heading, justify="right" if heading else "left")
        table.add_column("budget")
        frontier = self.frontier
        for index, entry in enumerate(self.candidates):
            marks = (">" if index == self.chosen else " ") + ("*" if entry in frontier else " ")
            found = entry.measured
            table.add_row(
                marks,
                str(len(entry.float_nodes)),
                f"{found.sqnr_db:.1f}",
                "" if found.top1_agreement is None else f"{found.top1_agreement:.1%}",
                "" if found.metric is None else f"{found.metric:.4g}",
                "not timed" if found.speedup is None else f"{found.speedup:.2f}",
                "met" if entry.within_budget else "missed",
            )
        return table

    def plot(self, path: Path) -> None:
        """Draw speed against accuracy into an image file.

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        figure = require("matplotlib.figure").Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        timed = [entry for entry in self.candidates if entry.measured.speedup is not None]
        axes.scatter([e.measured.speedup for e in timed], [e.measured.sqnr_db for e in timed], color="0.6")
        front = sorted((e.measured.speedup, e.measured.sqnr_db) for e in self.frontier if e in timed)
        axes.plot(*zip(*front, strict=True), marker="o")
        axes.axhline(self.budget.min_sqnr_db, linestyle="--", color="0.4")
        axes.set_xlabel("times as fast as FP32")
        axes.set_ylabel("SQNR of the worst level, dB")
        figure.savefig(path)

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def load(cls, path: Path) -> SearchReport:
        """Read what `save` wrote.

        Raises:
            CalibrationError: not a search report.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise CalibrationError(f"{path} is not a search report ({error}). Export the bundle again.") from error

    def _budget(self) -> str:
        parts = [f"{self.budget.min_sqnr_db:g} dB"]
        if self.budget.min_top1_agreement is not None:
            parts.append(f"top-1 agreement {self.budget.min_top1_agreement:.1%}")
        if self.budget.min_metric is not None:
            parts.append(f"metric {self.budget.min_metric:.4g}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The plan of the candidate that was taken, and all that were measured."""

    plan: QuantizationPlan
    report: SearchReport


class SearchLog:
    """Candidates measured so far, one entry of the store each, so that a stopped search goes on where it was.

    Args:
        store: where they are kept; None keeps nothing.
        decides: all that decides a measurement, beside the nodes in float.
        title: what people call the engine.
    """

    def __init__(
        self, store: Store | None = None, decides: Mapping[str, object] | None = None, title: str = ""
    ) -> None:
        self._store = store
        self._decides = dict(decides or {})
        self._title = title
        self._known: dict[frozenset[str], Measured] = {}

    def get(self, nodes: Iterable[str]) -> Measured | None:
        """Return what a set of float nodes gave; None when it was not measured."""
        chosen = frozenset(nodes)
        if chosen not in self._known and self._store is not None:
            kept = self._store.load(self._address(chosen))
            with suppress(msgspec.MsgspecError):
                if kept is not None:
                    self._known[chosen] = msgspec.json.decode(kept, type=Measured)
        return self._known.get(chosen)

    def add(self, nodes: Iterable[str], measured: Measured) -> None:
        """Keep a measurement, on disk before this returns."""
        chosen = frozenset(nodes)
        self._known[chosen] = measured
        if self._store is not None:
            self._store.save(self._address(chosen), msgspec.json.encode(measured))

    def _address(self, nodes: frozenset[str]) -> Address:
        title = f"{self._title}, {len(nodes)} layers in float"
        return address("searches", self._decides | {"float_nodes": sorted(nodes)}, title=title)


def search(
    model: ir.Model,
    plan: QuantizationPlan,
    sensitivity: Sensitivity,
    measure: Callable[[QuantizationPlan], Measured],
    budget: SearchBudget,
    *,
    savings_ms: Mapping[str, float] | None = None,
    log: SearchLog | None = None,
    on_candidate: Callable[[Candidate], None] | None = None,
) -> SearchResult:
    """Find the fastest set of float nodes within a budget.

    Args:
        model: the FP32 master graph.
        plan: everything in integers that can be.
        sensitivity: each node's noise.
        measure: builds the engine of a plan and measures it.
        budget: what the engine must give.
        savings_ms: what each node gains by running in integers; None: its MACs stand for it.
        log: measurements of a search that was stopped.
        on_candidate: hears of each candidate.

    Returns:
        The fastest candidate within the budget; where none is, the most accurate one.
    """
    bench = _Bench(
        model=model,
        plan=plan,
        sensitivity=sensitivity,
        measure=measure,
        budget=budget,
        log=log or SearchLog(),
        on_candidate=on_candidate,
    )
    cost = _floored(savings_ms or {entry.node: float(entry.macs) for entry in sensitivity.nodes})
    worth = {entry.node: entry.noise / cost[entry.node] for entry in sensitivity.nodes}
    order = sorted(worth, key=lambda node: -worth[node])
    count = _fewest(bench, order)
    if count:
        _take_back(bench, order[:count], cost)
    return bench.result("MACs" if savings_ms is None else "profile")


def _floored(cost: Mapping[str, float]) -> dict[str, float]:
    """Costs of at least half their mean: a node in float also converts what it reads and writes."""
    least = sum(cost.values()) / (2 * max(len(cost), 1)) or 1.0
    return {node: max(value, least) for node, value in cost.items()}


def _fewest(bench: _Bench, order: list[str]) -> int:
    """Return the least number of nodes, from the front of the order, that meets the budget; 0 also where all do not."""
    if bench.try_out(()).within_budget:
        return 0
    missed, met = 0, 1
    while not bench.try_out(order[:met]).within_budget:
        if met == len(order):
            return 0
        missed, met = met, min(2 * met, len(order))
    while met - missed > 1:
        middle = (missed + met) // 2
        if bench.try_out(order[:middle]).within_budget:
            met = middle
        else:
            missed = middle
    return met


def _take_back(bench: _Bench, nodes: list[str], cost: Mapping[str, float]) -> None:
    """Put nodes back into the integers, the dearest first, while the budget holds."""
    kept = set(nodes)
    for node in sorted(nodes[:-1], key=lambda node: -cost[node])[:MOST_REFINEMENTS]:
        if bench.try_out(kept - {node}).within_budget:
            kept.discard(node)


class _Bench:
    """Measures candidates and remembers them."""

    def __init__(
        self,
        *,
        model: ir.Model,
        plan: QuantizationPlan,
        sensitivity: Sensitivity,
        measure: Callable[[QuantizationPlan], Measured],
        budget: SearchBudget,
        log: SearchLog,
        on_candidate: Callable[[Candidate], None] | None,
    ) -> None:
        self._model = model
        self._plan = plan
        self._alone_db = {entry.node: entry.worst_db for entry in sensitivity.nodes}
        self._measure = measure
        self._budget = budget
        self._log = log
        self._on_candidate = on_candidate or (lambda candidate: None)
        self._seen: dict[frozenset[str], Candidate] = {}

    def try_out(self, nodes: Iterable[str]) -> Candidate:
        chosen = frozenset(nodes)
        if chosen not in self._seen:
            measured = self._log.get(chosen)
            if measured is None:
                measured = self._measure(self.plan_of(chosen))
                self._log.add(chosen, measured)
            candidate = Candidate(
                float_nodes=tuple(sorted(chosen)), measured=measured, within_budget=self._budget.met_by(measured)
            )
            self._seen[chosen] = candidate
            self._on_candidate(candidate)
        return self._seen[chosen]

    def plan_of(self, nodes: Iterable[str]) -> QuantizationPlan:
        reasons = {
            node: f"kept in float by the search: alone it leaves {self._alone_db[node]:.1f} dB" for node in nodes
        }
        return self._plan.without(self._model, reasons) if reasons else self._plan

    def result(self, cost_from: str) -> SearchResult:
        candidates = sorted(self._seen.values(), key=lambda entry: (len(entry.float_nodes), entry.float_nodes))
        within = [entry for entry in candidates if entry.within_budget]
        chosen = max(within, key=_speed) if within else max(candidates, key=lambda entry: entry.measured.sqnr_db)
        report = SearchReport(
            budget=self._budget,
            cost_from=cost_from,
            candidates=tuple(candidates),
            chosen=candidates.index(chosen),
        )
        return SearchResult(plan=self.plan_of(chosen.float_nodes), report=report)


def _speed(candidate: Candidate) -> tuple[float, int]:
    """By measured speed, and where nothing can be timed, by the number of float nodes."""
    return (candidate.measured.speedup or 0.0, -len(candidate.float_nodes))


def _beats(one: Candidate, other: Candidate) -> bool:
    if one.measured.speedup is None or other.measured.speedup is None:
        return False
    mine, its = ((entry.measured.speedup or 0.0, entry.measured.sqnr_db) for entry in (one, other))
    return mine[0] >= its[0] and mine[1] >= its[1] and mine != its
