"""A report as Markdown, for a pull request: the tables without the drawings."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deploykit.printable import printable
from deploykit.reports.sections import Section, Table

_ACTING = re.compile(r"([\\`*_{}\[\]<>#|~])")


def markdown_page(title: str, sections: Iterable[Section], footer: str) -> str:
    """Return the page; what concerns one bundle alone is folded away under its name."""
    parts, bundle = [f"# {_text(title)}"], None
    for section in sections:
        if section.table is None:
            continue
        if section.bundle != bundle:
            parts += ["</details>"] if bundle is not None else []
            bundle = section.bundle
            parts.append(f"<details><summary>{_text(str(bundle))}</summary>")
        parts.append(f"{'##' if bundle is None else '###'} {_text(section.title)}")
        parts += [_text(section.text)] if section.text else []
        parts.append(_table(section.table))
    parts += ["</details>"] if bundle is not None else []
    return "\n\n".join([*parts, _text(footer)]) + "\n"


def _table(table: Table) -> str:
    rule = ["---:" if place in table.right else "---" for place in range(len(table.columns))]
    lines = [map(_text, table.columns), rule, *(map(_text, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """Write a text so that nothing in it is Markdown or HTML."""
    return _ACTING.sub(r"\\\1", " ".join(printable(text).split()))
