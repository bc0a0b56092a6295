"""Exit codes and messages of the command itself."""

from __future__ import annotations

import pytest

from deploykit.cli import main as main_module
from deploykit.errors import DeployKitError


def test_an_unknown_command_is_bad_usage(call):
    done = call("exprt")
    assert done.code == 2
    assert "error: No such command 'exprt'" in done.err


def test_a_missing_argument_is_bad_usage_and_names_the_help(call):
    done = call("verify")
    assert done.code == 2
    assert "BUNDLE" in done.err
    assert "deploykit verify --help" in done.err


def test_no_command_prints_the_help_and_no_error(call):
    done = call()
    assert done.code == 2
    assert "Usage: deploykit" in done.out
    assert "error" not in done.err


def test_an_unforeseen_error_is_one_line_without_a_traceback(call, monkeypatch):
    monkeypatch.setattr("deploykit.bundle.open_bundle", lambda folder: 1 / 0)
    done = call("inspect", "somewhere")
    assert done.code == 1
    assert done.err.startswith("error: ZeroDivisionError: division by zero. This is a fault in deploykit")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_wherever_it_stands(call, place, tmp_path):
    words = ["inspect", str(tmp_path)]
    words.insert(place, "--debug")
    with pytest.raises(DeployKitError):
        call(*words)


def test_an_interrupt_gives_130(call, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("deploykit.bundle.open_bundle", interrupt)
    done = call("inspect", "somewhere")
    assert (done.code, done.err) == (main_module.INTERRUPTED, "error: interrupted; nothing was left half-written.\n")
