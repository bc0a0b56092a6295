"""From what a user asks for, and a target, to the options of an export: the target decides all that is not given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit.backends.backend import Backend, resolve
from deploykit.backends.table import backend_names, engine_names, load_backend
from deploykit.errors import MissingDependency, SpecError, nearest
from deploykit.options import ExportOptions
from deploykit.processor import this_machine, this_processor
from deploykit.spec import Batch, Int8, Precision, parse_batch, parse_precision
from deploykit.target import RuntimeChoice, Target, find_target, known_names, targets
from deploykit.unset import UNSET, UnsetType, given

DEVICE_TREE_MODEL = Path("/proc/device-tree/model")


def export_options(
    target: str | None,
    *,
    runtime: str | UnsetType = UNSET,
    precision: str | Precision | UnsetType = UNSET,
    settings: Mapping[str, Any] | None = None,
    batch: Batch | UnsetType = UNSET,
    embed_preprocessing: bool | UnsetType = UNSET,
    portable: bool | UnsetType = UNSET,
    **others: Any,
) -> ExportOptions:
    """Return the options of an export.

    Args:
        target: an edge target's name, alias or TOML file; or one of the runtime's own targets; None: none.
        runtime: as for `deploykit.export_backbone`; needed where no edge target is named.
        precision: a name, or the dataclass with its settings.
        settings: of a precision that is given by name, or by the target.
        batch: images in a call.
        embed_preprocessing: the engine takes pixels.
        portable: the device finishes the engine.
        others: fields of `ExportOptions`, which no target decides.

    Raises:
        SpecError: an unknown target, or one that does not have what was given.
        MissingDependency: the target's preferred runtime is not installed, and no other was named.
    """
    described = _described(target, runtime)
    if described is None:
        return ExportOptions(
            runtime=_named_runtime(target, runtime),
            precision=_precision("fp32" if precision is UNSET else precision, settings, {}),
            batch=1 if batch is UNSET else batch,
            embed_preprocessing=given(embed_preprocessing, False),
            portable=given(portable, False),
            target=target,
            **others,
        )
    wanted = described.precision if precision is UNSET else precision
    name = wanted if isinstance(wanted, str) else wanted.name
    choice = _choice(described, runtime, name)
    backend, finished_there = _backend(choice), given(portable, choice.portable)
    return ExportOptions(
        runtime=choice.name,
        precision=_precision(wanted, settings, choice.int8 if name == Int8.name else {}),
        batch=parse_batch(described.batch) if batch is UNSET else batch,
        embed_preprocessing=given(embed_preprocessing, described.input == "uint8"),
        portable=finished_there,
        target=None if finished_there else own_target(backend, described),
        made_for=described,
        **others,
    )


def _described(target: str | None, runtime: str | UnsetType) -> Target | None:
    """Return the edge target of a name; None: it is one of the runtime's own, which go before aliases, or unknown."""
    found = find_target(target) if target is not None else None
    if found is None or runtime is UNSET or target == found.name:
        return found
    return None if target in load_backend(str(runtime)).targets else found


def backend_for(options: ExportOptions) -> Backend:
    """Return the descriptor of the engine that is asked for: of its runtime, on the device of its target."""
    target, backend = options.made_for, load_backend(options.runtime)
    return backend if target is None else backend.on_device(target.choice(options.runtime).device)


def own_target(backend: Backend, target: Target) -> str | None:
    """Return which of a runtime's own targets an edge target is; None: the runtime has none to choose."""
    names = (target.compute_capability, target.processor)
    return next((name for name in names if name in backend.targets), None)


def is_here(target: Target) -> bool:
    """Return whether this machine is the target: its instruction set, its instructions, its model, its GPU."""
    chip = this_processor()
    if this_machine() != target.machine or not set(target.instructions) <= set(chip.int8):
        return False
    if target.model is not None and not re.search(target.model, f"{chip.model}\n{_board()}"):
        return False
    return target.compute_capability is None or target.compute_capability in _compute_capabilities()


def targets_here() -> tuple[str, ...]:
    """Return the names of the targets that this machine is."""
    return tuple(name for name, target in targets().items() if is_here(target))


def check_runtimes(target: Target) -> None:
    """Refuse a target of the user's own that names runtimes or precisions that are not there.

    Raises:
        SpecError: naming the runtime or the precision, or settings that do not fit together.
    """
    for choice in target.runtime:
        backend = _backend(choice)
        if not backend.has_engines:
            raise SpecError(
                f"the target {target.name} names {choice.name}, which has no engines. "
                f"Known: {', '.join(engine_names())}."
            )
        if choice.portable and backend.portable is None:
            raise SpecError(
                f"the target {target.name} asks for a portable engine of {choice.name}, which has no portable form. "
                "Leave portable out."
            )
        for key in choice.options:
            if key not in backend.open_options:
                raise SpecError(
                    f"the target {target.name} sets {key!r} of {backend.title}. "
                    f"{nearest(key, backend.open_options) if backend.open_options else 'It has no such settings.'}"
                )
        if backend.check_settings is not None:
            try:
                resolve(backend.check_settings)(choice.options)
            except SpecError as error:
                raise SpecError(f"the target {target.name}: {error}") from error


def _named_runtime(target: str | None, runtime: str | UnsetType) -> str:
    """Return the runtime where no edge target decides it.

    Raises:
        SpecError: none was given.
    """
    if runtime is not UNSET:
        return str(runtime)
    if target is None:
        raise SpecError(f"no runtime and no target were given. Give runtime= ({', '.join(engine_names())}) or target=.")
    owners = [name for name in engine_names() if target in load_backend(name).targets]
    if owners:
        raise SpecError(f"{target!r} is a target of {', '.join(owners)}, and no runtime was given. Give runtime=.")
    raise SpecError(f"unknown target {target!r}. {nearest(target, known_names())}")


def _choice(target: Target, runtime: str | UnsetType, precision: str) -> RuntimeChoice:
    """Return the runtime that was given, or the first of the target that has the precision.

    Raises:
        SpecError: the target lacks what was given.
        MissingDependency: that runtime is not installed.
    """
    check_runtimes(target)
    if runtime is not UNSET:
        load_backend(str(runtime))
        for choice in target.runtime:
            if choice.name == runtime:
                return choice
        raise SpecError(
            f"the target {target.name} has the runtimes {', '.join(target.runtimes)}, and runtime={runtime!r} was "
            "given. Choose one of these, or leave runtime out."
        )
    able = [choice for choice in target.runtime if precision in _backend(choice).precisions]
    if not able:
        have = (f"{_backend(each).title} has {', '.join(_backend(each).precisions)}" for each in target.runtime)
        raise SpecError(f"no runtime of the target {target.name} has {precision}: {'; '.join(have)}.")
    first, others = _backend(able[0]), able[1:]
    try:
        first.check_installed()
    except MissingDependency as error:
        installed = [each.name for each in others if _backend(each).installed_version()]
        hint = f" Or choose another of its runtimes: runtime={installed[0]!r}." if installed else ""
        message = f"the target {target.name} prefers {first.title}: {error}{hint}"
        raise MissingDependency(message, package=error.package, command=error.command) from error
    return able[0]


def _backend(choice: RuntimeChoice) -> Backend:
    return load_backend(choice.name).on_device(choice.device)


def _precision(wanted: str | Precision, settings: Mapping[str, Any] | None, by_target: Mapping[str, Any]) -> Precision:
    """Return a precision whose settings that were not given are the target's."""
    if isinstance(wanted, str):
        return parse_precision(wanted, {**by_target, **(settings or {})})
    defaults = Int8()
    left = {name: value for name, value in by_target.items() if getattr(wanted, name) == getattr(defaults, name)}
    return replace(wanted, **left)


def _board() -> str:
    """Return what the board says that it is; empty where there is no device tree."""
    try:
        return DEVICE_TREE_MODEL.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _compute_capabilities() -> set[str]:
    """Return the compute capabilities of the GPUs here, as the runtimes' ties have them."""
    gpus = [backend for backend in map(load_backend, backend_names()) if backend.tie and not backend.uses_cpu]
    return {tie["compute_capability"] for tie in (each.machine_tie() for each in gpus) if "compute_capability" in tie}
