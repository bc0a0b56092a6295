"""Part of a build in a process of its own: its library may write to the terminal, start threads, or end it."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from pathlib import Path

from deploykit.child_process import child_environment, run_module
from deploykit.errors import ExportError

MOST_SECONDS = 1800.0
"""What takes longer is stopped; a network of a thousand operators takes about a minute."""

_LOG_LINES = 8


def run_build(
    what: str, module: str, *arguments: str, answers: Collection[int], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module until it ends, with status 0 or one of its answers.

    Args:
        what: it does, for messages.
        module: to run.
        arguments: for it.
        answers: exit statuses that say why it did nothing, which its caller reads.
        folder: the working directory; None: that of this process.

    Raises:
        ExportError: it crashed, failed, or took too long.
    """
    try:
        done = subprocess.run(
            run_module(module, *arguments),
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            env=child_environment(),
            timeout=MOST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"the {what} took more than {MOST_SECONDS:g} s and was stopped. Try a smaller model."
        ) from error
    if done.returncode in (0, *answers):
        return done
    tail = "".join(f"\n  {line}" for line in done.stderr.splitlines()[-_LOG_LINES:])
    cause = f"crashed (signal {-done.returncode})" if done.returncode < 0 else "failed"
    hint = " Out of memory is the usual cause: free some, or try a smaller model." if done.returncode == -9 else ""
    raise ExportError(f"the {what} {cause}.{hint} The end of its log:{tail}")
