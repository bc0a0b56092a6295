"""Starting Python once more: with this deploykit, and with no module of the working directory.

Python puts the working directory, or an empty entry of ``PYTHONPATH``, before everything that is installed, so that a
``msgspec.py`` in a folder of downloads would be run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

_HAS_SAFE_PATH = sys.version_info >= (3, 11)
_WITHOUT_FOLDER = "import sys; sys.path[:] = [entry for entry in sys.path if entry]; "
_RUN_MODULE = (
    "import runpy; from deploykit.child_process import die_with_parent; die_with_parent({parent}); "
    "runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_code(code: str, *arguments: str) -> list[str]:
    """Return the command that runs Python code; ``sys.argv[1:]`` are the arguments."""
    if _HAS_SAFE_PATH:
        return [sys.executable, "-P", "-c", code, *arguments]
    return [sys.executable, "-c", _WITHOUT_FOLDER + code, *arguments]


def run_module(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module as a program, which on Linux does not outlive this process."""
    return run_code(_RUN_MODULE.format(parent=os.getpid(), module=module), *arguments)


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process when the one that started it dies, however that happens; end if it has already."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def child_environment() -> dict[str, str]:
    """Return this process's environment for a child and those that it starts, with this deploykit first on the path."""
    root = str(Path(__file__).parent.parent.absolute())
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = os.pathsep.join([root, *map(os.path.abspath, others)])
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def drop_working_folder() -> None:
    """Take the working directory, which ``python -m`` puts first, off the path; unless deploykit itself lies there."""
    first = sys.path[0] if sys.path else ""
    safe = getattr(sys.flags, "safe_path", False)
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed, and holds no module
        return
    if not safe and first in ("", str(here)) and not Path(__file__).is_relative_to(here):
        del sys.path[0]
