"""``assert_parity``: two models give the same, in a test of one's own."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from deploykit.arguments import check_arguments
from deploykit.arrays import Array, ImageArray
from deploykit.backends.runtime import Runtime, run_in_batches
from deploykit.errors import ParityError, SpecError, nearest
from deploykit.loading import load_bundle
from deploykit.parity.compare import LOGITS, ParityAccumulator
from deploykit.parity.dead import dead_outputs
from deploykit.parity.report import MAX_SQNR_DB, LevelParity, ParityReport
from deploykit.spec import Fp32

if TYPE_CHECKING:
    from rich.console import RenderableType

Arrays: TypeAlias = dict[str, Array]
Model: TypeAlias = "Callable[[Any], object] | Mapping[str, object] | str | os.PathLike[str]"
"""A model or a function of images, its outputs by name, or a bundle's folder."""

OUTPUT = "output"
"""The name of an output that has none."""

TEXT_WIDTH = 120


def assert_parity(
    engine: Model,
    reference: Model,
    images: Array,
    *,
    min_sqnr: float | None = None,
    per_level: Mapping[str, float] | None = None,
    min_top1_agreement: float | None = None,
) -> ParityReport:
    """Hold a model's outputs against a reference's on the same images, level by level.

    NaN, infinity, one value everywhere and the same answer for different images fail whatever the budget is.

    Args:
        engine: what is tested: a model from `deploykit.create_backbone` or `deploykit.load_bundle`, a torch module in
            eval mode, any function of images, outputs by name, or a bundle's folder.
        reference: what it is held against, of the same kinds.
        images: as both take them, with N first.
        min_sqnr: what every level must reach, in dB; None: the engine's own budget, and FP32's where it has none.
        per_level: budgets of single levels in dB, in the place of ``min_sqnr``.
        min_top1_agreement: the share of images, 0 to 1, that must get the same class.

    Returns:
        The report, which passed.

    Raises:
        ParityError: a level is outside its budget, missing or of another shape; the message has the table.
        SpecError: a budget for a level that is not there, a torch module in training mode, or outputs of no images.
    """
    check_arguments(assert_parity, locals())
    __tracebackhide__ = True
    report = compare_models(
        engine, reference, images, min_sqnr=min_sqnr, per_level=per_level, min_top1_agreement=min_top1_agreement
    )
    if not report.passed:
        raise ParityError(failure_text(report))
    return report


def compare_models(
    engine: Model,
    reference: Model,
    images: Array,
    *,
    min_sqnr: float | None = None,
    per_level: Mapping[str, float] | None = None,
    min_top1_agreement: float | None = None,
) -> ParityReport:
    """Compare as `assert_parity` does, and return the report whether it passed or not.

    Raises:
        ParityError: a level is missing or of another shape, or the reference gives NaN or infinity.
        SpecError: as for `assert_parity`.
    """
    with ExitStack() as stack:
        opened = [_opened(each, stack) for each in (engine, reference)]
        found, expected = _same_names(*(_outputs(each, images) for each in opened))
        budget = _budget(opened[0]) if min_sqnr is None else min_sqnr
        about, other = _about(opened[0]), _about(opened[1])
    budgets = dict.fromkeys(expected, budget) | _checked(per_level or {}, expected)
    return ParityReport(
        reference=" ".join(filter(None, other)),
        runtime=about[0],
        runtime_version=about[1],
        precision=about[2],
        images=len(images),
        min_sqnr_db=min(budgets.values()),
        min_top1_agreement=min_top1_agreement,
        levels=_levels(expected, found, budgets, min_top1_agreement),
    )


def failure_text(report: ParityReport) -> str:
    """Return what is wrong with each level of a report that failed, and below it the table."""
    try:
        report.raise_for_failures()
    except ParityError as error:
        return f"{error}\n{as_text(report.render())}"
    return as_text(report.render())


def as_text(renderable: RenderableType) -> str:
    """Return a table as plain text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=TEXT_WIDTH, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _levels(
    expected: Arrays, found: Arrays, budgets: Mapping[str, float], min_top1: float | None
) -> tuple[LevelParity, ...]:
    logits = next((name for name in (LOGITS, *expected) if name in expected and expected[name].ndim == 2), None)
    if min_top1 is not None and (logits is None or (logits != LOGITS and len(expected) > 1)):
        raise SpecError(f"min_top1_agreement needs {LOGITS!r} of shape (N, classes); the outputs are {list(expected)}.")
    accumulator = ParityAccumulator(logits=logits)
    accumulator.update(expected, found)
    dead = dead_outputs(expected, found)
    least = min(budgets.values())
    levels = []
    for level in accumulator.result(min_sqnr_db=-MAX_SQNR_DB):
        faults = [dead[level.name]] if level.name in dead else []
        budget, agreement = budgets[level.name], level.top1_agreement
        if least <= level.sqnr_db < budget:  # below the least budget the report says so itself
            faults.append(f"{level.sqnr_db:.1f} dB; its own budget is at least {budget:g} dB")
        same_class = min_top1 is None or agreement is None or agreement >= min_top1
        passed = not faults and level.sqnr_db >= budget and same_class
        levels.append(replace(level, faults=tuple(faults), passed=passed))
    return tuple(levels)


def _opened(model: Model, stack: ExitStack) -> object:
    if isinstance(model, (str, os.PathLike)):
        return stack.enter_context(load_bundle(Path(os.fsdecode(model))))
    return model


def _outputs(model: object, images: Array) -> Arrays:
    """Return a model's outputs for all images, by name; `OUTPUT` for one without a name.

    Raises:
        SpecError: not a model, a torch module in training mode, or outputs that are no arrays of N.
    """
    if isinstance(model, Runtime):
        return dict(run_in_batches(model, cast("ImageArray", images)))  # which checks their dtype
    answer = model if isinstance(model, Mapping) else _called(model, images)
    if isinstance(answer, (tuple, list)):
        answer = {f"{OUTPUT}{index}": each for index, each in enumerate(answer)}
    named = answer if isinstance(answer, Mapping) else {OUTPUT: answer}
    arrays = {str(name): _array(value) for name, value in named.items()}
    wrong = [f"{name} {array.shape}" for name, array in arrays.items() if array.ndim < 2 or len(array) != len(images)]
    if wrong or not arrays:
        raise SpecError(f"expected outputs of shape ({len(images)}, ...); there are {', '.join(wrong) or 'none'}.")
    return arrays


def _called(model: object, images: Array) -> object:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        if not callable(model):
            raise SpecError(f"a {type(model).__name__} is no model; expected one, a function, outputs, or a folder.")
        return model(images)
    if model.training:
        raise SpecError("the torch module is in training mode. Fix: call .eval() first.")
    anchor = next(iter(model.parameters()), torch.zeros(1))
    with torch.no_grad():
        return model(torch.tensor(images, device=anchor.device))


def _array(value: object) -> Array:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _same_names(found: Arrays, expected: Arrays) -> tuple[Arrays, Arrays]:
    """Give an output without a name the other side's, where each has one."""
    if len(found) == len(expected) == 1 and OUTPUT in (*found, *expected):
        (mine,), (its,) = found.values(), expected.values()
        name = next((each for each in (*expected, *found) if each != OUTPUT), OUTPUT)
        return {name: mine}, {name: its}
    return found, expected


def _checked(per_level: Mapping[str, float], expected: Arrays) -> dict[str, float]:
    for name, value in per_level.items():
        if name not in expected:
            raise SpecError(f"per_level has {name!r}, which is not compared. {nearest(name, expected)}")
        if not np.isfinite(value):
            raise SpecError(f"per_level has {value} for {name!r}; expected a finite number of dB.")
    return dict(per_level)


def _budget(model: object) -> float:
    return model.precision.min_sqnr_db if isinstance(model, Runtime) else Fp32().min_sqnr_db


def _about(model: object) -> tuple[str, str, str]:
    """Return what ran, its version, and its precision."""
    if isinstance(model, Runtime):
        return model.runtime, model.manifest.runtime_version, model.precision.name
    if isinstance(model, Mapping):
        return "outputs", "", ""
    return getattr(model, "__name__", type(model).__name__), "", ""
