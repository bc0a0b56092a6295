"""What the commands print: tables and text on stdout, errors, warnings and progress on stderr, JSON for programs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.cli.spellings import as_options
from deploykit.errors import DeployKitWarning, SpecError
from deploykit.optional import require
from deploykit.output_places import check_outside_bundles
from deploykit.printable import is_printable, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from deploykit.spec import InputSpec

TUNING_LOG = "deploykit.backends.tuning"
"""The logger that hears how engines are opened where that is not by their defaults."""

PIPED_WIDTH = 160
"""The width of a table that goes to a file or a pipe, in characters."""

PLOTS = (".png", ".svg")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where to run: auto, or a device that `deploykit doctor` lists.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="Threads to compute in.", show_default="as many as may be used"),
]
TrustOption = Annotated[
    bool | None,
    typer.Option(
        "--trust/--no-trust",
        help="Open, or refuse, an engine that is machine code and was not made by this user on this machine.",
        show_default="open with a warning",
    ),
]
SignedByOption = Annotated[
    str | None,
    typer.Option(
        "--signed-by",
        metavar="FILE",
        help="The public key, or the authority's certificate, of who must have signed the bundle.",
    ),
]
RayFlag = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="Work in processes of a Ray cluster, which RAY_ADDRESS names, or of this machine (needs the extra ray).",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="N", help="Processes of --ray.", show_default="one for each processor of the cluster"
    ),
]
BundleArgument = Annotated[str, typer.Argument(metavar="BUNDLE", help="A folder that `deploykit export` wrote.")]


@cache
def stderr_console() -> Console:
    """Return the one console on stderr, so that a line does not break a running progress bar."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


def show(*renderables: RenderableType) -> None:
    """Print text, in which nothing acts on the terminal, or tables, on stdout."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
    for renderable in renderables:
        if isinstance(renderable, str):
            console.print(printable(renderable), soft_wrap=True, markup=False)
        else:
            console.print(renderable)


def table(
    columns: Iterable[str], rows: Iterable[Iterable[str]], *, right: Iterable[str] = (), title: str = ""
) -> Table:
    """Return a plain table; ``right`` names the columns of figures."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(printable(title), style="bold") if title else None, title_justify="left")
    figures = set(right)
    for column in columns:
        made.add_column(column, justify="right" if column in figures else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def show_json(value: object) -> None:
    """Print dataclasses, mappings, lists and plain values as indented JSON on stdout."""
    sys.stdout.write(json_text(value))


def json_text(value: object) -> str:
    """Return dataclasses, mappings, lists and plain values as indented JSON."""
    import msgspec

    try:
        text = msgspec.json.encode(value)
    except UnicodeEncodeError:  # the name of a file that is not UTF-8
        text = msgspec.json.encode(_printable_strings(msgspec.to_builtins(value)))
    return _printable_json(msgspec.json.format(text, indent=2).decode()) + "\n"


def show_error(message: str) -> None:
    """Print ``error: ...`` on stderr."""
    _labelled("error", message, "bold red")


def show_warning(message: str) -> None:
    """Print ``warning: ...`` on stderr."""
    _labelled("warning", message, "yellow")


def _labelled(label: str, message: str, style: str) -> None:
    from rich.text import Text

    with suppress(OSError):  # a full disk behind stderr: the exit code still tells
        stderr_console().print(Text.assemble((f"{label}: ", style), printable(message)), soft_wrap=True)


def _printable_strings(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable_strings(name): _printable_strings(item) for name, item in value.items()}
    return [_printable_strings(item) for item in value] if isinstance(value, list) else value


def _printable_json(text: str) -> str:
    """Write what JSON may hold and a terminal would act on as JSON's escapes, which mean the same."""
    if is_printable(text):
        return text
    return "".join(each if is_printable(each) else f"\\u{ord(each):04x}" for each in text)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print each warning of deploykit's own once, as one line; those of other packages are not for the user."""
    seen: set[str] = set()

    def print_once(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            show_warning(as_options(str(message)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"deploykit\.")
        warnings.filterwarnings("always", category=DeployKitWarning)
        warnings.showwarning = print_once
        yield


class _ToStderr(logging.Handler):
    """Print each message once, as a line on stderr."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._seen:
            self._seen.add(message)
            _labelled("tuned", message, "cyan")


@contextmanager
def told_tunings() -> Iterator[None]:
    """Print that an engine is opened as ``deploykit tune`` measured best for it here."""
    handler, logger = _ToStderr(), logging.getLogger(TUNING_LOG)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def check_plot(path: str) -> None:
    """Refuse, before any work, a file that a drawing cannot be written to.

    Raises:
        SpecError: another kind of file, or no such folder, or one of a bundle.
        MissingDependency: matplotlib is not installed.
    """
    require("matplotlib.figure")
    if Path(path).suffix not in PLOTS or not Path(path).absolute().parent.is_dir():
        raise SpecError(f"--plot is {path}; give a file that ends in {' or '.join(PLOTS)}, in a folder that exists.")
    check_outside_bundles(Path(path))


def input_text(spec: InputSpec) -> str:
    """Return ``"1 x 224 x 224 x 3 uint8 NHWC"``, with the sizes of a range behind."""
    sides = " x ".join(str(side) for side in (spec.batch, *spec.shape[1:]))
    return f"{sides} {spec.dtype} {spec.layout}{f' ({spec.sizes})' if spec.sizes is not None else ''}"


def size_text(size: float) -> str:
    """Return Bytes to ``"1.5 MB"``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
