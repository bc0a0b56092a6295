"""The words of a command line, before they are read: what would be taken otherwise than it was meant."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from deploykit.errors import SpecError


def check_not_empty(words: Sequence[str]) -> None:
    """Refuse an empty argument, which as a path would be the folder that the command is called in.

    Raises:
        SpecError: there is one.
    """
    for place, word in enumerate(words):
        if not word or (word.startswith("--") and word.endswith("=")):
            before = " ".join(["deploykit", *words[:place]])
            raise SpecError(
                f"the argument after `{before}` is empty{f' ({word})' if word else ''}, as a shell's variable is that "
                "is not set. Give a value, or leave it out."
            )


def check_given_once(words: Sequence[str], command: Any) -> None:
    """Refuse an option of one value that is given several times, of which the last would be taken without a word.

    Args:
        words: behind ``deploykit``.
        command: of click, or of typer's copy of it, with its subcommands.

    Raises:
        SpecError: there is one.
    """
    given = [*words]
    while given and given[0] in getattr(command, "commands", {}):
        command = command.commands[given.pop(0)]
    given = given[: given.index("--")] if "--" in given else given
    for option in command.params:
        if option.param_type_name != "option" or option.multiple or option.is_flag:
            continue
        values = [value for name in option.opts for value in _values(name, given)]
        if len(values) > 1:
            raise SpecError(
                f"{option.opts[0]} was given {len(values)} times ({', '.join(values)}); expected once. "
                "Give one, or call the command once for each."
            )


def _values(option: str, words: Sequence[str]) -> list[str]:
    """Return what follows an option at each of its places."""
    after = [value for word, value in itertools.pairwise(words) if word == option]
    return after + [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
