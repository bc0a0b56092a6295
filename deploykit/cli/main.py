"""The deploykit command: its subcommands, and what an error becomes."""

from __future__ import annotations

import functools
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer
from typer.core import TyperGroup

import deploykit
from deploykit.cli import (
    bench,
    cache,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    import_model,
    inspect,
    list,
    pull,
    push,
    report,
    repository,
    run,
    sensitivity,
    sign,
    sweep,
    targets,
    tune,
    verify,
)
from deploykit.cli.exit_codes import BAD_USAGE, FAILED, exit_code_of, failure
from deploykit.cli.output import show, show_error, show_json, shown_warnings, told_tunings
from deploykit.cli.spellings import as_options
from deploykit.cli.streams import PIPE_CLOSED, OutputLost, standard_streams
from deploykit.cli.words import check_given_once, check_not_empty
from deploykit.errors import DeployKitError
from deploykit.interruption import INTERRUPTED, interruptible
from deploykit.optional import PACKAGES
from deploykit.places import check_working_folder, is_environment, is_out_of_memory

_SETTINGS = {"help_option_names": ["-h", "--help"]}

_TAG = re.compile(r"\[(?=[a-z#/@])")
"""Where rich begins to read markup."""

app = typer.Typer(
    context_settings=_SETTINGS,
    epilog=export.EXAMPLE,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("export", epilog=export.EXAMPLE, context_settings=_SETTINGS)(export.export)
app.command("import", epilog=import_model.EXAMPLE, context_settings=_SETTINGS)(import_model.import_model)
app.command("run", epilog=run.EXAMPLE, context_settings=_SETTINGS)(run.run)
app.command("verify", epilog=verify.EXAMPLE, context_settings=_SETTINGS)(verify.verify)
app.command("bench", epilog=bench.EXAMPLE, context_settings=_SETTINGS)(bench.bench)
app.command("tune", epilog=tune.EXAMPLE, context_settings=_SETTINGS)(tune.tune)
app.command("evaluate", epilog=evaluate.EXAMPLE, context_settings=_SETTINGS)(evaluate.evaluate)
app.command("compare", epilog=compare.EXAMPLE, context_settings=_SETTINGS)(compare.compare)
app.command("report", epilog=report.EXAMPLE, context_settings=_SETTINGS)(report.report)
app.command("sign", epilog=sign.EXAMPLE, context_settings=_SETTINGS)(sign.sign)
app.command("push", epilog=push.EXAMPLE, context_settings=_SETTINGS)(push.push)
app.command("pull", epilog=pull.EXAMPLE, context_settings=_SETTINGS)(pull.pull)
app.command("repository", epilog=repository.EXAMPLE, context_settings=_SETTINGS)(repository.repository)
app.command("extract", epilog=extract.EXAMPLE, context_settings=_SETTINGS)(extract.extract)
app.command("inspect", epilog=inspect.EXAMPLE, context_settings=_SETTINGS)(inspect.inspect)
app.command("sensitivity", epilog=sensitivity.EXAMPLE, context_settings=_SETTINGS)(sensitivity.sensitivity)
app.command("list", epilog=list.EXAMPLE, context_settings=_SETTINGS)(list.list_backbones)
app.command("sweep", epilog=sweep.EXAMPLE, context_settings=_SETTINGS)(sweep.sweep)
app.command("targets", epilog=targets.EXAMPLE, context_settings=_SETTINGS)(targets.list_targets)
app.command("demo", epilog=demo.EXAMPLE, context_settings=_SETTINGS)(demo.demo)
app.command("doctor", epilog=doctor.EXAMPLE, context_settings=_SETTINGS)(doctor.doctor)

cache_app = typer.Typer(
    context_settings=_SETTINGS, epilog=cache.EXAMPLE, no_args_is_help=True, pretty_exceptions_enable=False
)
cache_app.command("list", epilog=cache.LIST_EXAMPLE, context_settings=_SETTINGS)(cache.list_entries)
cache_app.command("prune", epilog=cache.PRUNE_EXAMPLE, context_settings=_SETTINGS)(cache.prune)
cache_app.command("verify", epilog=cache.VERIFY_EXAMPLE, context_settings=_SETTINGS)(cache.verify)
cache_app.command("clear", epilog=cache.CLEAR_EXAMPLE, context_settings=_SETTINGS)(cache.clear)
app.add_typer(cache_app, name="cache", help="List, check and clear what is kept: engines, plans and measurements.")


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"deploykit {deploykit.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Vision backbones, compiled and quantized for the edge, with the numbers that prove nothing broke.

    Exit codes: 0 done; 1 numbers outside their budget; 2 bad usage; 3 a damaged bundle; 4 a missing package;
    5 no such device here; 6 anything else that failed; 130 interrupted.
    """


@functools.cache
def _command() -> TyperGroup:
    """Build the command of `app` once: a process that calls `main` again would read every annotation again."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)  # noqa: S101  (of several commands; narrows the type)
    _escape_help(command)
    return command


def _escape_help(command: object) -> None:
    """Escape brackets in the help of a command, its options and its subcommands: rich would read them as markup."""
    for part in (command, *getattr(command, "params", ())):
        for name in ("help", "epilog"):
            text = getattr(part, name, None)
            if isinstance(text, str):
                setattr(part, name, _TAG.sub(r"\\[", text))
    for each in getattr(command, "commands", {}).values():
        _escape_help(each)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``--debug`` is taken at any place, and `verify` hears it too."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    debug = "--debug" in given
    words = [word for word in given if word != "--debug"]
    words += ["--debug"] if debug and words[:1] == ["verify"] else []
    try:
        with standard_streams(), shown_warnings(), told_tunings(), interruptible():
            check_working_folder()
            check_not_empty(words)
            check_given_once(words, _command())
            code = _command().main(words, "deploykit", standalone_mode=False)
    except BrokenPipeError:
        return PIPE_CLOSED
    except OutputLost as error:
        show_error(str(error))
        return FAILED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error, json="--json" in words)
    if code == INTERRUPTED:
        with suppress(OSError):  # a terminal that is gone, which is what SIGHUP says
            show_error("interrupted; nothing was left half-written.")
    return code if isinstance(code, int) else 0


def _report(error: Exception, *, json: bool) -> int:
    """Print an error as one message, with ``json`` on stdout too, and choose the exit code."""
    code, message = _explained(error)
    if message:
        show_error(message)
    if message and json:
        with suppress(OSError, OutputLost), standard_streams():
            show_json(failure(error, message) | {"exit_code": code})
    return code


def _explained(error: Exception) -> tuple[int, str]:
    """Return the exit code of an error and its message; none where all was printed already."""
    if isinstance(error, DeployKitError):
        return exit_code_of(error), as_options(str(error))
    # Newer releases of typer carry their own click, so usage errors share no base that can be imported.
    describe = getattr(error, "format_message", None)
    if callable(describe):
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "deploykit"
        # A bare `deploykit` has printed the help already.
        return BAD_USAGE, f"{describe()} See `{where} --help`." if describe() else ""
    package = PACKAGES.get((getattr(error, "name", None) or "").partition(".")[0])
    if isinstance(error, ModuleNotFoundError) and package is not None:
        return _explained(package.missing())
    if is_out_of_memory(error):
        return FAILED, (
            f"there is not enough memory{f' ({error})' if str(error) else ''}. "
            "Give a smaller batch or image size, or use a machine with more."
        )
    if is_environment(error):
        return FAILED, f"{error}. This machine could not do it; nothing else is wrong."
    return FAILED, (
        f"{type(error).__name__}: {error}. This is a fault in deploykit, not in what you asked for: "
        "run the same command with --debug and report what it prints."
    )
