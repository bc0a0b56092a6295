"""A report as one HTML page: no script, no file beside it, no request to a network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources

from deploykit.printable import printable
from deploykit.reports.sections import Section, Table

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>{footer}</footer>
</body>
</html>
"""


def html_page(
    title: str, sections: Iterable[Section], drawings: Mapping[tuple[str, str | None], str], footer: str
) -> str:
    """Return the page; every text in it is escaped, whoever wrote it."""
    parts, bundle = [], None
    for section in sections:
        if section.bundle is not None and section.bundle != bundle:
            bundle = section.bundle
            parts.append(f"<h2>{_text(bundle)}</h2>")
        parts += _section(section, drawings)
    style = resources.files("deploykit").joinpath("data", "report.css").read_text(encoding="utf-8")
    return _PAGE.format(title=_text(title), style=style, body="\n".join(parts), footer=_text(footer))


def _section(section: Section, drawings: Mapping[tuple[str, str | None], str]) -> list[str]:
    level = "h2" if section.bundle is None else "h3"
    parts = [f"<{level}>{_text(section.title)}</{level}>"]
    if section.text:
        parts.append(f"<p>{_text(section.text)}</p>")
    drawing = drawings.get((section.drawing, section.bundle)) if section.drawing is not None else None
    if drawing is not None:
        parts.append(f'<figure aria-label="{_text(section.title)}">{drawing}</figure>')
    if section.table is not None:
        parts.append(_table(section.table))
    return parts


def _table(table: Table) -> str:
    head = "".join(f"<th{_class(place, table)}>{_text(name)}</th>" for place, name in enumerate(table.columns))
    rows = ["".join(_cell(place, text, table) for place, text in enumerate(row)) for row in table.rows]
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _cell(place: int, text: str, table: Table) -> str:
    verdict = ""
    if re.match(r"pass\b", text):
        verdict = "pass"
    elif re.search(r"\bFAIL\b", text):
        verdict = "fail"
    return f"<td{_class(place, table, verdict)}>{_text(text)}</td>"


def _class(place: int, table: Table, verdict: str = "") -> str:
    names = " ".join(filter(None, ("figure" if place in table.right else "", verdict)))
    return f' class="{names}"' if names else ""


def _text(text: str) -> str:
    return escape(printable(text), quote=True)
