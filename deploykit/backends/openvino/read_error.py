"""What OpenVINO's exceptions say beside where in its sources they were thrown."""

from __future__ import annotations

import re

_ABOUT_ITSELF = re.compile(
    r"^(FrontEnd API failed|Model wasn't fully converted|Summary:).*$"
    r"|(Exception from |Check '.*' failed at )?\S+\.[ch]pp:\d+:?"
)
_LONGEST = 400


def read_error(error: BaseException) -> str:
    """Return the message in one line: operators and reasons, without file names of OpenVINO's own sources."""
    lines = [_ABOUT_ITSELF.sub("", line.strip()).strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} ..."
