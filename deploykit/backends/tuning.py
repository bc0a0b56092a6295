"""What was measured best for an engine on this machine, kept in the store: threads, streams and runs in flight.

An entry is found by the digests of the engine's files, the runtime's version, the device, the hint, the processor and
how many threads the process may use: on another machine, or in a smaller container, nothing is found.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from deploykit.backends.backend import Backend
from deploykit.errors import DeployKitError
from deploykit.manifest import Manifest, engine_parts
from deploykit.places import cache_root
from deploykit.processor import this_processor
from deploykit.threads import MOST_THREADS, Hint, allowed_processors, thread_limit

if TYPE_CHECKING:
    from deploykit.store import Address

KIND = "tuning"

logger = logging.getLogger(__name__)
"""Hears, at the level INFO, of each engine that is not opened by its defaults."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How an engine is opened here for one hint.

    ``threads`` compute; ``streams`` is how many calls share them at a time, None: the runtime's choice; ``in_flight``
    is how many runs a stream starts before it waits for the first. ``unit`` is ``ms`` (the median of a call) or
    ``images/s``, empty while it is a candidate; ``default`` and ``best`` are the figures without and with these
    settings, ``gain`` how many times better, measured anew after the choice.
    """

    hint: Hint
    threads: int | None = None
    streams: int | None = None
    in_flight: int = 2
    unit: str = ""
    default: float = 0.0
    best: float = 0.0
    gain: float = 1.0

    def __str__(self) -> str:
        parts = [f"threads {self.threads or 'all'}", f"in flight {self.in_flight}"]
        parts += [f"streams {self.streams}"] * (self.streams is not None)
        return f"{', '.join(parts)}, measured {self.gain:.2f} times as good as the default for {self.hint}"


def remembered(manifest: Manifest, backend: Backend, device: str, hint: Hint) -> Tuning | None:
    """Return what was measured best for an engine here; None where nothing was, or nothing can be kept."""
    if not manifest.files or not backend.tunable:
        return None
    try:
        root = cache_root(tell=False)
        if root is None or not (root / KIND).is_dir():  # nothing was ever tuned here
            return None
        from deploykit.store import Store

        value = Store(root).load(_address(manifest, backend, device, hint))
        found = None if value is None else msgspec.json.decode(value, type=Tuning)
    except (DeployKitError, msgspec.MsgspecError):  # no folder to keep things in, or a device without platformdirs
        return None
    usable = found is not None and found.hint == hint and 1 <= found.in_flight <= MOST_THREADS
    return found if usable else None


def remember(manifest: Manifest, backend: Backend, device: str, tuning: Tuning) -> None:
    """Keep what was measured best, in place of what was."""
    from deploykit.store import Store

    Store().save(_address(manifest, backend, device, tuning.hint), msgspec.json.encode(tuning))


def forget(manifest: Manifest, backend: Backend, device: str, hint: Hint) -> None:
    """Open an engine with the defaults again."""
    from deploykit.store import Store

    Store().remove(_address(manifest, backend, device, hint))


def tell(manifest: Manifest, tuning: Tuning) -> None:
    """Say how an engine is opened, to this module's log; not of a candidate that is yet to be measured."""
    if tuning.unit:
        logger.info("%s in %s is opened with %s.", manifest.backbone.name, manifest.runtime, tuning)


def _address(manifest: Manifest, backend: Backend, device: str, hint: Hint) -> Address:
    from deploykit.store import address  # where nothing was tuned, an engine opens sooner without

    parts = engine_parts(manifest.engine, manifest.files)
    decides = {
        "engine": {name: manifest.files[name].sha256 for name in parts},
        "runtime": manifest.runtime,
        "version": backend.installed_version(),
        "device": device.lower(),
        "hint": hint,
        "processor": this_processor().model,
        "threads": thread_limit() or len(allowed_processors()),
    }
    return address(KIND, decides, title=f"{manifest.backbone.name} {manifest.runtime} {hint} {device}")
