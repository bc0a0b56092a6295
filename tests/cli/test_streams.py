"""The command beside streams that are closed, full or ASCII, and with names that would act on a terminal."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploykit.bundle import MANIFEST, MANIFEST_DIGEST
from deploykit.bundle_files import digest_line
from deploykit.cli.main import main
from deploykit.cli.streams import PIPE_CLOSED, OutputLost, standard_streams
from tests.test_bundle import ROOT

BUNDLE = Path(__file__).parents[1] / "data" / "bundles-0.1.0" / "onnxruntime-int8"
COMMANDS = (["cache", "list", "--json"], ["inspect", str(BUNDLE)])


def command(words, redirection: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command in a shell, as a user types it."""
    line = f'exec "$0" -m deploykit "$@" {redirection}'
    return subprocess.run(
        ["sh", "-c", line, sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        timeout=120,
        check=False,
    )


def is_quiet(done: subprocess.CompletedProcess[bytes]) -> bool:
    return b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_closed_streams_change_nothing(words, closed):
    done = command(words, closed)
    assert done.returncode == 0, done.stderr
    assert is_quiet(done)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_full_disk_behind_stdout_is_a_failure_and_said(words):
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not on this system")
    done = command(words, ">/dev/full")
    assert done.returncode == 6
    assert is_quiet(done), done.stderr.decode()
    assert b"No space left" in done.stderr


def test_a_bad_bundle_stays_a_failure_whatever_becomes_of_the_output(tmp_path):
    for redirection in (">/dev/full", ">&- 2>&-", "2>/dev/full"):
        done = command(["verify", str(tmp_path)], redirection)
        assert done.returncode == 3
        assert is_quiet(done)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_reader_that_goes_away_ends_it_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "deploykit", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=pipe,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    assert done.returncode in (1, 141)
    assert is_quiet(done), done.stderr.decode()


def test_output_that_cannot_be_written_ends_the_command_in_this_process_too(monkeypatch):
    """To nobody who reads it, and to a full disk; the interpreter's own flush at its end then fails no more."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", nobody)
        assert main(["cache", "list", "--json"]) == PIPE_CLOSED
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not on this system")
    told = io.StringIO()
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        patch.setattr(sys, "stderr", told)
        assert main(["cache", "list", "--json"]) == 6
    assert "error: standard output cannot be written: " in told.getvalue()


@pytest.mark.parametrize("size", [10, 1_000_000], ids=["within the buffer", "above it"])
def test_a_full_disk_behind_stdout_is_told_from_one_behind_another_file(monkeypatch, capsys, size):
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not on this system")
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(OutputLost, match="No space left"), standard_streams():
            sys.stdout.write("x" * size)
    with pytest.raises(OSError, match="No space left"), standard_streams(), Path("/dev/full").open("w") as other:
        other.write("x" * size)
    assert capsys.readouterr().out.strip() == ""


def test_an_error_that_names_a_file_is_not_of_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), standard_streams():
        (tmp_path / "absent").read_text()


def named(tmp_path: Path, name: str) -> Path:
    """A bundle whose manifest has a name, and a digest that fits."""
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    raw = json.loads((folder / MANIFEST).read_text())
    raw["backbone"]["name"] = name
    text = json.dumps(raw).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_DIGEST).write_bytes(digest_line(text))
    return folder


@pytest.mark.parametrize(("encoding", "flags"), [("ascii", []), ("ascii", ["--json"]), ("utf-8", [])])
def test_other_alphabets_are_written_in_every_encoding(tmp_path, encoding, flags):
    folder = named(tmp_path, "日本 é")
    done = command(["inspect", str(folder), *flags], PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert is_quiet(done)
    text = done.stdout.decode(encoding)
    assert ("日本 é" if encoding == "utf-8" else "\\u65e5\\u672c ") in text


def test_markup_in_a_manifest_is_printed_as_it_is(call, tmp_path):
    folder = named(tmp_path, "[red]x[/red][/bold]")
    done = call("inspect", folder)
    assert done.code == 0
    assert "[red]x[/red][/bold]" in done.out


RAW = ("\x1b", "\x9b", "\u202e", "\r", "\udcff")


@pytest.mark.parametrize("flags", [[], ["--json"]])
@pytest.mark.parametrize("name", ["\x1b[31mred", "a\rb", "a\x9b2Jb", "\u202egnp.exe", os.fsdecode(b"not-utf-8-\xff")])
def test_names_of_files_never_reach_the_terminal_raw(call, tmp_path, name, flags):
    folder = tmp_path / name
    shutil.copytree(BUNDLE, folder)
    (folder / name).write_text("x")
    for words in (["verify", *flags, folder], ["inspect", *flags, folder], ["run", folder, name]):
        done = call(*words)
        assert done.code in (2, 3)
        assert not [each for each in RAW if each in done.out + done.err]
        assert not done.out or done.json()["exit_code"] == done.code
    (folder / name).unlink()
    done = call("inspect", *flags, folder)
    assert done.code == 0, done.err
    assert not [each for each in RAW if each in done.out + done.err]


def test_a_name_that_is_not_utf_8_is_printed_by_a_process_of_its_own(tmp_path):
    folder = tmp_path / os.fsdecode(b"\x1b[31m-\xff")
    shutil.copytree(BUNDLE, folder)
    for flags in ([], ["--json"]):
        done = command(["inspect", *flags, str(folder)])
        assert done.returncode == 0, done.stderr
        assert b"\x1b" not in done.stdout
        assert b"\xff" not in done.stdout
