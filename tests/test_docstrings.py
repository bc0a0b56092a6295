"""How docstrings read: the first line says what a function does, as an imperative sentence."""

from __future__ import annotations

import ast
import re

from tests.test_structure import MODULES, ROOT, tree_of

LEAST_IMPERATIVE = 0.8

_NO_VERBS = """
A All An Any As At Behind Beside Both Each Every For From How In Its No Nothing Of On One Some That The Their These This
Those To Two What When Where Whether Which Who Whose With Without
"""
_OPENERS_THAT_ARE_NO_VERB = frozenset(_NO_VERBS.split())
_VERBS_IN_S = frozenset(("Pass", "Express", "Compress", "Address", "Focus", "Process", "Cross"))


def is_imperative(line: str) -> bool:
    """Whether a first line opens with a verb in its base form, as far as its first word tells."""
    word = line.partition(" ")[0].strip(".,:;")
    if word in _OPENERS_THAT_ARE_NO_VERB or not re.fullmatch(r"[A-Z][a-z]+", word):
        return False
    return not word.endswith("s") or word in _VERBS_IN_S


def first_lines() -> list[tuple[str, str]]:
    """The first docstring line of every function and method but properties, with where it stands."""
    found = []
    for path in MODULES.values():
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            text = ast.get_docstring(node)
            if text and not any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", text.splitlines()[0]))
    return found


def test_the_check_tells_sentences_from_noun_phrases():
    assert is_imperative("Keep planned INT8 nodes in float where this runtime is faster that way")
    assert is_imperative("Pass a batch on.")
    for line in ("The levels.", "What a dialect leaves in float.", "Returns the levels.", "``(N, C)`` to the same."):
        assert not is_imperative(line)


def test_first_lines_are_imperative_sentences():
    lines = first_lines()
    others = [f"{where}: {line}" for where, line in lines if not is_imperative(line)]
    share = 1 - len(others) / len(lines)
    assert share >= LEAST_IMPERATIVE, f"{share:.0%} are; these are not:\n" + "\n".join(others)
