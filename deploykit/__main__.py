"""``deploykit`` and ``python -m deploykit``: the command line, stopped cleanly from its first moment on."""

from __future__ import annotations

import sys

from deploykit.child_process import drop_working_folder
from deploykit.errors import MissingDependency
from deploykit.interruption import INTERRUPTED, interruptible
from deploykit.optional import require


def main() -> int:
    """Run the command; returns its exit code, 130 also where it is stopped while it is still being imported."""
    drop_working_folder()
    try:
        with interruptible():
            require("typer")
            require("rich")
            from deploykit.cli.main import main as run

            return run()
    except MissingDependency as error:
        sys.stderr.write(f"error: {error}\n")
        from deploykit.cli.exit_codes import MISSING_PACKAGE

        return MISSING_PACKAGE
    except KeyboardInterrupt:
        sys.stderr.write("deploykit: interrupted; nothing was left half-written.\n")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
