"""Text from files and manifests, made safe to print: nothing in it acts on a terminal."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_ACTING = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, lone surrogates, and separators of lines and paragraphs."""

_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""What changes the direction of text, so that one name can look like another."""


def printable(text: str) -> str:
    r"""Write characters that would act on a terminal as ``\x1b``, ``\u202e`` and the like; new lines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character) if _acts(character) else character for character in text)


def is_printable(text: str) -> bool:
    """Return whether nothing in a text acts on a terminal; new lines and tabs do not."""
    return (text.isascii() and text.isprintable()) or not any(map(_acts, text))


def _acts(character: str) -> bool:
    if character in _KEPT:
        return False
    return character in _REORDERING or unicodedata.category(character) in _ACTING


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
