"""What a name given for a backbone can be: text, or a path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deploykit.errors import SpecError

TIMM = "timm/"


def path_of(name: Any) -> Path:
    """Return the path that is given as text, bytes or an object with one.

    Raises:
        SpecError: it is none of them.
    """
    try:
        return Path(os.fsdecode(name))
    except TypeError as error:
        raise SpecError(
            f"{name!r:.80} is a {type(name).__name__}; expected a backbone's name, a module, or the path of a bundle."
        ) from error


def is_bare(name: object) -> bool:
    """Return whether a name is text without a separator of folders: a backbone's, before it is a folder's."""
    return isinstance(name, str) and not any(each in name for each in ("/", os.sep, os.altsep) if each)
