"""Plans that were made before: a plan is the same for every runtime, so a second export need not calibrate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

import deploykit
from deploykit.calibration.checkpoint import Checkpoint
from deploykit.calibration.plan import QuantizationPlan
from deploykit.errors import CalibrationError
from deploykit.store import Address, Store, address


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """What decides a plan: its own key, and the graph that it is for."""

    plan: str
    graph: str

    @classmethod
    def of(cls, plan_key: str, model: ir.Model) -> PlanKey:
        """Return the key for a graph."""
        graph = ir.to_proto(model).SerializeToString(deterministic=True)
        return cls(plan=plan_key, graph=hashlib.sha256(graph).hexdigest())

    def address(self, kind: str) -> Address:
        """Return where the store has what goes by this key."""
        return address(kind, {"plan": self.plan, "graph": self.graph, "deploykit": deploykit.__version__})


class PlanCache:
    """The plans of a store, and the calibrations under way; safe to use from several processes at once.

    Args:
        store: None: the one of `deploykit.places.cache_root`.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store or Store()

    def get_or_make(self, key: PlanKey, make: Callable[[], QuantizationPlan]) -> QuantizationPlan:
        """Return the plan under ``key``; made once, whoever asks. A damaged one is made again.

        Where the store cannot be used, the plan is made and not kept, which a log line says.
        """
        made: list[QuantizationPlan] = []

        def build(folder: Path) -> None:
            made.append(make())
            made[0].save(folder)

        def check_fits(folder: Path) -> str | None:
            try:
                return None if QuantizationPlan.load(folder).key == key.plan else "it is the plan of another key"
            except CalibrationError as error:
                return str(error)

        with self._store.opened(key.address("plans"), build, check_fits) as folder:
            plan = made[0] if made else QuantizationPlan.load(folder)
        if made:
            self.checkpoint(key).remove()
        return plan

    def checkpoint(self, key: PlanKey) -> Checkpoint:
        """Return where the calibration for a key is kept while it runs."""
        return Checkpoint(self._store, key.address("calibrations"))
