"""What an export is asked for: one frozen object, built at the doors (Python, command line) and passed whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.spec import DEFAULT_BUILD, Batch, BuildOptions, Fp32, Precision
from deploykit.target import Target

if TYPE_CHECKING:
    from deploykit.backends.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What engine to make of a backbone, and how to prove it.

    Args:
        runtime: a name of `deploykit.backends.table`.
        precision: with its settings and its budget.
        batch: a number of images, or a range of them.
        embed_preprocessing: the engine takes uint8 pixels ``(N, H, W, C)`` and normalises them itself.
        target: which of the runtime's own targets the engine is built for, where it has some.
        made_for: the device that the engine is for; None: this machine, or whatever ``target`` says.
        portable: the device that opens the engine finishes it, where the runtime has such a form.
        build: what its build is told beside the target, where the runtime takes build options.
        probe_levels: also compare the levels inside an engine that returns only the head.
        time_against_fp32: time an INT8 engine beside FP32 of its runtime; the ratio, which differs from run to run,
            goes into the manifest.
        require_speedup: fail where an INT8 engine is slower than a float one.
        metric: the user's own figure of a model, higher is better, for the mixed-precision search.
        ray: count the statistics of a calibration in processes of a Ray cluster.
        workers: how many of them; None: one for each processor of the cluster.
        cache: use what was planned and measured before, and keep what is.
    """

    runtime: str
    precision: Precision = Fp32()
    batch: Batch = 1
    embed_preprocessing: bool = False
    target: str | None = None
    made_for: Target | None = None
    portable: bool = False
    build: BuildOptions = DEFAULT_BUILD
    probe_levels: bool = True
    time_against_fp32: bool = False
    require_speedup: bool = False
    metric: Callable[[Runtime], float] | None = None
    ray: bool = False
    workers: int | None = None
    cache: bool = True

    @property
    def target_name(self) -> str | None:
        """What the bundle says that it is for."""
        return self.made_for.name if self.made_for is not None else self.target
