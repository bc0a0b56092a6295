"""What OpenVINO's exceptions say beside where in its sources they were thrown."""

from __future__ import annotations

import re

_ABOUT_ITSELF = re.compile(
    r"^(FrontEnd API failed|Model wasn't fully converted|Summary:).*$"
    r"|(Exception from |Check '.*' failed at )?\S+\.[ch]pp:\d+:?"
)
_LONGEST = 400

REFUSALS = (RuntimeError, UnicodeDecodeError)
"""What the binding raises. The second stands for the first where the message quotes bytes of a damaged file."""


def read_error(error: BaseException) -> str:
    """Return the message in one line: operators and reasons, without file names of OpenVINO's own sources."""
    message = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else str(error)
    lines = [_ABOUT_ITSELF.sub("", line.strip()).strip() for line in message.splitlines()]
    text = " ".join(line for line in lines if line) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} ..."
