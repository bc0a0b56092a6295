"""Work on the processes of a Ray cluster, or of this machine, through Ray Data: the one door to Ray.

Ray schedules; what each piece of work is lies with the caller. Reports of usage are off (`deploykit.privacy`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from deploykit import errors
from deploykit.errors import DeployKitError, SpecError
from deploykit.optional import require
from deploykit.privacy import silence_runtimes

if TYPE_CHECKING:
    from types import ModuleType

RESULT = "result"
"""The column of a worker's answers."""
FAILURE = "failure"
"""The column of its errors: a class of `deploykit.errors`, and the message; empty where there is none."""


class Worker(Protocol):
    """What a process of the cluster makes once, and calls for each piece."""

    def __call__(self, number: int) -> bytes:
        """Do the piece of that number."""
        ...


@contextmanager
def cluster() -> Iterator[ModuleType]:
    """Give the module `ray`, connected: to the cluster that ``RAY_ADDRESS`` names, else to processes of this machine.

    A connection that was there before stays; one that is made here is closed.

    Raises:
        MissingDependency: ray is not installed.
        DeployKitError: no cluster answers.
    """
    silence_runtimes()
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _quiet():
        require("ray.data")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)  # Ray tells of each step of its plan
    ray = require("ray")
    if ray.is_initialized():
        yield ray
        return
    own = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    try:
        with _quiet():
            ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False, **own)
    except Exception as error:  # Ray raises classes of its own
        raise DeployKitError(
            f"Ray does not start: {error}. Check RAY_ADDRESS, or leave it out to use processes of this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def run_pieces(
    ray: ModuleType, worker: type[Worker], arguments: Mapping[str, Any], pieces: list[int], workers: int | None
) -> Iterator[bytes]:
    """Do pieces of work in the processes of a cluster; yield what each gives, in order, as soon as it is there.

    Args:
        ray: from `cluster`.
        worker: is made in each process with ``arguments``.
        arguments: by name; they are sent to each process.
        pieces: the numbers of the pieces.
        workers: how many processes; None: one for each processor of the cluster.

    Raises:
        SpecError: no number of workers.
        DeployKitError: a worker failed; of deploykit's own errors, the error itself.
    """
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise SpecError(f"workers is {workers!r}; expected how many processes, 1 or more, or None.")
    if not pieces:
        return
    count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    count = min(count, len(pieces))
    with _quiet():
        rows = iter(_ordered(ray, worker, arguments, pieces, count).iter_rows())
    try:
        for _ in pieces:
            with _quiet():
                row = next(rows)
            if row[FAILURE]:
                break
            yield row[RESULT]
    except Exception as error:  # Ray raises classes of its own
        raise DeployKitError(f"a worker of Ray failed: {error}. Check its machine, and run again.") from error
    if row[FAILURE]:
        raise _error_of(row[FAILURE])


def _ordered(ray: ModuleType, worker: type[Worker], arguments: Mapping[str, Any], pieces: list[int], count: int) -> Any:
    """Return the dataset of the workers' answers, in the order of the pieces."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    rows = ray.data.from_items([{"piece": piece} for piece in pieces], override_num_blocks=len(pieces))
    return rows.map_batches(
        _Process,
        fn_constructor_kwargs={"worker": worker, "arguments": dict(arguments)},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=1,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Pass over Ray's announcements of what its next version changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Process:
    """A worker in a process of the cluster; an error of deploykit's is an answer, which Ray would wrap in its own."""

    def __init__(self, worker: type[Worker], arguments: dict[str, Any]) -> None:
        self._work, self._failure = None, ""
        try:
            self._work = worker(**arguments)
        except DeployKitError as error:
            self._failure = _text_of(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        results, failures = [], []
        for piece in batch["piece"]:
            result, failure = b"", self._failure
            try:
                result = result if self._work is None else self._work(int(piece))
            except DeployKitError as error:
                failure = _text_of(error)
            results.append(result)
            failures.append(failure)
        return {RESULT: results, FAILURE: failures}


def _text_of(error: DeployKitError) -> str:
    return f"{type(error).__name__}\n{error}"


def _error_of(text: str) -> DeployKitError:
    """Return the error whose text came from a worker."""
    name, _, message = text.partition("\n")
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, DeployKitError)):
        kind = DeployKitError
    try:
        return kind(message)
    except TypeError:  # of a class that takes more than a message
        return DeployKitError(message)
