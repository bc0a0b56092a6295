"""``deploykit targets``: the devices that can be exported for, and what each decides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploykit.cli.output import JsonFlag, show, show_json, table
from deploykit.errors import SpecError, nearest
from deploykit.export.target_options import check_runtimes, is_here, own_target, targets_here
from deploykit.target import FOLDER, SUFFIX, find_target, known_names, targets

if TYPE_CHECKING:
    from deploykit.target import RuntimeChoice, Target

EXAMPLE = "Example: deploykit targets raspberry-pi-5"


def list_targets(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME|FILE.toml]", help="Explain this one, by its name, alias or file.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """List the devices to export for, or explain what one of them decides and where its figures come from."""
    if name is None:
        _list(json=json)
        return
    target = find_target(name)
    if target is None:
        raise SpecError(f"unknown target {name!r}. {nearest(name, known_names())}")
    check_runtimes(target)
    if json:
        show_json({"target": target, "here": is_here(target)})
        return
    _explain(target, name)


def _list(*, json: bool) -> None:
    here = targets_here()
    if json:
        show_json({"targets": list(targets().values()), "here": here})
        return
    rows = (
        [
            name,
            ", ".join(target.aliases),
            target.title,
            ", ".join(target.runtimes),
            target.precision,
            _mark(name in here),
        ]
        for name, target in targets().items()
    )
    show(table(("target", "also", "device", "runtimes", "precision", "here"), rows))
    show(
        f"This machine is: {', '.join(here) or 'none of these'}.",
        "Next: deploykit targets NAME explains one; deploykit export resnet18 --target NAME exports for it.",
    )


def _mark(is_this: bool) -> str:
    return "yes" if is_this else ""


def _explain(target: Target, given: str) -> None:
    batch = (
        target.batch if isinstance(target.batch, int) else "{} to {}, best at {}".format(*_min_max_opt(target.batch))
    )
    taken = "pixels, uint8 (N, H, W, C)" if target.input == "uint8" else "normalised images, float32 (N, C, H, W)"
    facts: dict[str, Any] = {
        "device": target.title,
        "also": ", ".join(target.aliases) or "no other name",
        "machine": f"{target.machine}{f', matches {target.model!r}' if target.model else ''}",
        "instructions": ", ".join(target.instructions) or "none needed",
        "int8 scheme": target.processor,
        "GPU": target.compute_capability or "none of CUDA",
        "precision": target.precision,
        "batch": batch,
        "input": taken,
        "memory": f"{target.memory_mb} MB for the engine's files" if target.memory_mb else "no budget",
        "this machine": "yes" if is_here(target) else "no: nothing is timed here, and the status stays built",
    }
    show(*(f"{name:<13} {value}" for name, value in facts.items()), "")
    columns = ("runtime", "device", "built for", "newest version", "settings")
    show(table(columns, (_runtime_row(target, choice) for choice in target.runtime)))
    path = Path(given) if given.endswith(SUFFIX) else FOLDER / f"{target.name}{SUFFIX}"
    sources = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    show("Sources:", *(f"  {line.lstrip('# ')}" for line in sources)) if sources else None
    show(f"Next: deploykit export resnet18 --target {given} --calibration FOLDER")


def _min_max_opt(batch: tuple[int, int, int]) -> tuple[int, int, int]:
    least, best, most = batch
    return least, most, best


def _runtime_row(target: Target, choice: RuntimeChoice) -> list[str]:
    from deploykit.backends.table import load_backend

    backend = load_backend(choice.name).on_device(choice.device)
    own = "what it finds" if choice.portable else own_target(backend, target) or "any"
    settings = [f"{key} {value}" for key, value in (choice.int8 | choice.options).items()]
    return [choice.name, choice.device, own, choice.version or "any", ", ".join(settings)]
