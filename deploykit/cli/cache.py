"""``deploykit cache``: what is kept from one call to the next, and keeping it small."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.cli.exit_codes import DAMAGED
from deploykit.cli.output import JsonFlag, show, show_json, size_text, table

if TYPE_CHECKING:
    from rich.table import Table

    from deploykit.store_upkeep import Pruned, StoreEntry

EXAMPLE = "Example: deploykit cache list"
LIST_EXAMPLE = "Example: deploykit cache list --json"
PRUNE_EXAMPLE = "Example: deploykit cache prune --limit 5GB"
VERIFY_EXAMPLE = "Example: deploykit cache verify"
CLEAR_EXAMPLE = "Example: deploykit cache clear"

LimitOption = Annotated[
    str | None,
    typer.Option(
        "--limit",
        metavar="SIZE",
        show_default="$DEPLOYKIT_CACHE_LIMIT, or 20GB",
        help="What may stay: '500MB', '20GB', '1.5GiB', or 'none' for any size.",
    ),
]


def list_entries(json: JsonFlag = False) -> None:
    """List the engines, plans and measurements that are kept, with their sizes and when each was last used."""
    from deploykit.store_upkeep import entries, leftovers, size_limit

    root, limit = _root(), size_limit()
    found = list(entries(root)) if root is not None else []
    litter = leftovers(root) if root is not None else []
    total = sum(entry.bytes for entry in found)
    if json:
        show_json(
            {
                "root": None if root is None else str(root),
                "limit": limit,
                "bytes": total,
                "entries": found,
                "litter": [str(path) for path in litter],
            }
        )
        return
    if found:
        show(_table(found))
    show(f"{len(found)} entries, {size_text(total)} of {_limit_text(limit)}, in {root or 'no folder'}.")
    if litter:
        show(f"{len(litter)} files and folders were left by ended processes or earlier versions.")
    damaged = any(entry.problem for entry in found)
    show(f"Next: deploykit cache {'prune' if litter or damaged else 'verify'}")


def prune(limit: LimitOption = None, json: JsonFlag = False) -> None:
    """Remove damaged entries, what ended processes left, and the least recently used entries above the limit."""
    from deploykit.store_upkeep import Pruned, parse_size, size_limit
    from deploykit.store_upkeep import prune as prune_store

    most = parse_size(limit, "--limit") if limit is not None else size_limit()
    root = _root()
    _show_removed(prune_store(root, most) if root is not None else Pruned(), root, json=json)


def verify(json: JsonFlag = False) -> None:
    """Read every byte of every entry and compare it with its digest; exit code 3 where one is damaged."""
    from deploykit.store_upkeep import entries

    root = _root()
    found = list(entries(root, verify=True)) if root is not None else []
    damaged = [entry for entry in found if entry.problem]
    if json:
        show_json({"root": None if root is None else str(root), "entries": found, "damaged": len(damaged)})
    else:
        if damaged:
            show(_table(damaged))
        show(f"{len(found)} entries, {len(damaged)} damaged. A damaged entry is never used: it is made again.")
        show(f"Next: deploykit cache {'prune' if damaged else 'list'}")
    if damaged:
        raise typer.Exit(DAMAGED)


def clear(json: JsonFlag = False) -> None:
    """Remove every entry that no process uses at this moment."""
    from deploykit.store_upkeep import Pruned
    from deploykit.store_upkeep import clear as clear_store

    root = _root()
    _show_removed(clear_store(root) if root is not None else Pruned(), root, json=json)


def _root() -> Path | None:
    from deploykit.store import Store

    return Store().root


def _show_removed(pruned: Pruned, root: Path | None, *, json: bool) -> None:
    if json:
        show_json({"root": None if root is None else str(root), "pruned": pruned})
        return
    show(
        f"Removed {len(pruned.entries)} entries and {pruned.litter} leftovers, {size_text(pruned.freed)}; "
        f"{size_text(pruned.left)} are left in {root or 'no folder'}."
    )
    show("Next: deploykit cache list")


def _table(found: list[StoreEntry]) -> Table:
    rows = [
        [
            entry.kind,
            entry.key[:12],
            entry.title,
            size_text(entry.bytes),
            f"{datetime.fromtimestamp(entry.used).astimezone():%Y-%m-%d %H:%M}",
            entry.problem or "",
        ]
        for entry in sorted(found, key=lambda entry: -entry.used)
    ]
    return table(("kind", "key", "what", "size", "last used", "problem"), rows, right=("size",))


def _limit_text(limit: int | None) -> str:
    return "any size" if limit is None else size_text(limit)
