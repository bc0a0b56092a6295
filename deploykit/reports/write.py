"""Write a report on bundles to a file."""

from __future__ import annotations

import os
from collections.abc import Sequence

from deploykit.errors import SpecError
from deploykit.manifest import own_version
from deploykit.names import path_of
from deploykit.output_places import check_result_file
from deploykit.places import write_whole
from deploykit.reports.facts import BundleFacts, Collected, collect, with_layers
from deploykit.reports.html_page import html_page
from deploykit.reports.markdown_page import markdown_page
from deploykit.reports.sections import sections

SUFFIXES = (".html", ".md")
MOST_BUNDLES = 32


def write_report(
    bundles: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    run: bool = True,
    layers: bool = False,
    device: str = "auto",
    threads: int | None = None,
    trust: bool | None = None,
) -> tuple[BundleFacts, ...]:
    """Write one page on bundles: each level's error, latency against accuracy, what the quantizer and the passes did.

    Args:
        bundles: their folders.
        output: ``.html``, one file that needs no other and no network; or ``.md``, for a pull request. Replaced where
            it is there.
        run: run the engines here, where their device is; False: what the bundles say of themselves.
        layers: also walk the layers of engines that are ONNX graphs in integers; needs the extra export.
        device: where they run.
        threads: as for `deploykit.loading.load_bundle`.
        trust: as for `deploykit.loading.load_bundle`.

    Returns:
        What the page says, bundle by bundle.

    Raises:
        SpecError: no bundles, or another kind of file, or one that lies in a bundle.
        BundleError: one is no bundle, or is damaged.
        StorageError: the file cannot be written.
        MissingDependency: matplotlib is not installed, for ``.html``; or the extra export, for the layers.
    """
    path, folders = path_of(output), [path_of(each) for each in bundles]
    if path.suffix.lower() not in SUFFIXES:
        raise SpecError(f"the report {path} is neither .html nor .md. Fix: give the file one of these endings.")
    check_result_file(path, "report")
    if not 1 <= len(folders) <= MOST_BUNDLES:
        raise SpecError(f"{len(folders)} bundles were given; expected 1 to {MOST_BUNDLES}.")
    collected = collect(folders, run=run, device=device, threads=threads, trust=trust)
    collected = with_layers(collected) if layers else collected
    write_whole(path, _page(collected, html=path.suffix.lower() == ".html"), what="report")
    return collected.bundles


def _page(collected: Collected, *, html: bool) -> str:
    facts = collected.bundles
    names = list(dict.fromkeys(each.side.manifest.backbone.name for each in facts))
    title = f"Parity of {', '.join(names)}"
    footer = f"Written by deploykit {own_version().get('deploykit', '')}".strip() + "."
    if not html:
        return markdown_page(title, sections(collected), footer)
    from deploykit.reports.drawings import draw_all

    return html_page(title, sections(collected), draw_all(facts), footer)
