"""Edge targets: devices described as data in ``export/targets/*.toml``, or in a TOML file of the user's own."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from deploykit.errors import SpecError, nearest
from deploykit.plain_files import FileTooLarge, NotPlainFile, read_plain
from deploykit.processor import INT8_ARM, INT8_X86, PROCESSOR_TARGETS
from deploykit.spec import Int8, parse_batch, parse_precision

FOLDER = Path(__file__).parent / "export" / "targets"
SUFFIX = ".toml"
MOST_BYTES = 1 << 20

Table = TypeVar("Table")


@dataclass(frozen=True, kw_only=True)
class RuntimeChoice:
    """A runtime that a target has.

    Args:
        name: the runtime.
        device: where it runs there; ``auto`` is the runtime's first device.
        portable: the device finishes the engine.
        version: the newest version of the runtime that the target can install; None: any.
        int8: settings of `deploykit.Int8` that are not given.
        options: the runtime's own settings when the engine is opened, such as OpenVINO's ``NUM_STREAMS``.
    """

    name: str
    device: str = "auto"
    portable: bool = False
    version: str | None = None
    int8: dict[str, str | bool | float] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device that engines are made for. It decides what the user does not.

    Args:
        title: what people call it.
        aliases: other names for it.
        machine: its instruction set, as ``platform.machine()`` says it.
        model: a regular expression for what the machine calls itself; None: any machine of this instruction set.
        instructions: the INT8 instructions that it has, by the names of `deploykit.processor`.
        processor: its quantization scheme: a name of `deploykit.processor.PROCESSOR_TARGETS`.
        compute_capability: that of its GPU, ``sm87``; None: no CUDA.
        runtime: its runtimes, the preferred one first.
        precision: what engines compute in.
        batch: images in a call, or (min, opt, max).
        input: ``float32`` is normalised (N, C, H, W); ``uint8`` is pixels (N, H, W, C).
        memory_mb: what the engine's files may take, in units of 1,000,000 bytes; None: no budget.
    """

    title: str
    aliases: tuple[str, ...] = ()
    machine: Literal["x86_64", "aarch64"]
    model: str | None = None
    instructions: tuple[str, ...] = ()
    processor: str
    compute_capability: str | None = None
    runtime: tuple[RuntimeChoice, ...]
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "int8"
    batch: int | tuple[int, int, int] = 1
    input: Literal["float32", "uint8"] = "float32"
    memory_mb: int | None = None
    name: str = ""

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The names of its runtimes, the preferred one first."""
        return tuple(each.name for each in self.runtime)

    def choice(self, runtime: str) -> RuntimeChoice:
        """Return what it says of one of its runtimes."""
        return next(each for each in self.runtime if each.name == runtime)


@functools.cache
def targets() -> dict[str, Target]:
    """Read the targets that deploykit carries, by name."""
    return {path.stem: read_target(path) for path in sorted(FOLDER.glob(f"*{SUFFIX}"))}


def known_names() -> tuple[str, ...]:
    """Return the names of the targets and their aliases."""
    return tuple(name for target in targets().values() for name in (target.name, *target.aliases))


def find_target(name: str) -> Target | None:
    """Return the target of a name, an alias, or a TOML file; None: there is none of that name.

    Raises:
        SpecError: a file that is not there, or that describes no target.
    """
    if name.endswith(SUFFIX):
        return read_target(Path(name))
    for target in targets().values():
        if name in (target.name, *target.aliases):
            return target
    return None


def read_target(path: Path) -> Target:
    """Read one TOML file; its stem is the target's name.

    Raises:
        SpecError: it cannot be read, or holds an unknown key or a value that no target has; the message names it.
    """
    content = _content(path)
    try:
        raw = msgspec.toml.decode(content)
    except ImportError as error:
        raise SpecError(
            f"{path} cannot be read: this Python has no TOML reader ({error}). Install it: pip install tomli"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"{path} is not TOML: {error}. Fix: repair the file.") from error
    if "name" in raw:
        raise SpecError(f"{path} sets name; a target's name is that of its file. Leave it out.")
    _check_keys(path, "", raw, Target)
    for table in raw.get("runtime", ()) if isinstance(raw.get("runtime"), list) else ():
        if isinstance(table, dict):
            _check_keys(path, "[[runtime]] ", table, RuntimeChoice)
    try:
        target = msgspec.convert(raw | {"name": path.stem}, Target)
    except msgspec.ValidationError as error:
        raise SpecError(f"{path} does not describe a target: {error}. `deploykit targets NAME` shows one.") from error
    problems = list(_problems(target))
    if problems:
        raise SpecError(f"{path} does not describe a target: {'; '.join(problems)}")
    return target


def _content(path: Path) -> bytes:
    try:
        return read_plain(path, MOST_BYTES, follow=True).removeprefix(codecs.BOM_UTF8)
    except FileTooLarge as error:
        raise SpecError(
            f"{path} has more than {MOST_BYTES} bytes; a target has a few lines. Give another file."
        ) from error
    except (NotPlainFile, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"{path} cannot be read ({reason}). Give a target's name or its TOML file.") from error


def _check_keys(path: Path, where: str, raw: Mapping[str, Any], kind: type[Any]) -> None:
    known = [each.name for each in fields(kind) if (kind, each.name) != (Target, "name")]
    for key in raw:
        if key not in known:
            raise SpecError(f"{path}: unknown key {where}{key!r}. {nearest(key, known)}")


def _problems(target: Target) -> Iterator[str]:
    """Yield what is wrong with values that have the right types."""
    instructions = (INT8_X86 if target.machine == "x86_64" else INT8_ARM).values()
    for name in target.instructions:
        if name not in instructions:
            yield f"unknown instructions {name!r} of {target.machine}. {nearest(name, instructions)}"
    if target.processor not in PROCESSOR_TARGETS:
        yield f"unknown processor {target.processor!r}. {nearest(target.processor, PROCESSOR_TARGETS)}"
    elif (target.machine == "x86_64") != target.processor.startswith("x86"):
        yield f"processor {target.processor!r} is none of {target.machine}. Give one that goes with machine."
    if not target.runtime:
        yield "it has no [[runtime]]. Give at least one."
    doubled = [name for name in target.runtimes if target.runtimes.count(name) > 1]
    if doubled:
        yield f"[[runtime]] {doubled[0]!r} stands there twice. Leave one out."
    if target.memory_mb is not None and target.memory_mb < 1:
        yield f"memory_mb is {target.memory_mb}; expected 1 or more."
    try:
        re.compile(target.model or "")
    except re.error as error:
        yield f"model is no regular expression: {error}."
    try:
        parse_batch(target.batch)
    except SpecError as error:
        yield str(error)
    for choice in target.runtime:
        yield from _choice_problems(choice)


def _choice_problems(choice: RuntimeChoice) -> Iterator[str]:
    """Yield what is wrong with one runtime of a target."""
    settings = [each.name for each in fields(Int8)]
    unknown = [key for key in choice.int8 if key not in settings]
    for key in unknown:
        yield f"unknown int8 setting {key!r} of {choice.name}. {nearest(key, settings)}"
    try:
        parse_precision("int8", {} if unknown else choice.int8)
    except SpecError as error:
        yield f"int8 of {choice.name}: {error}"
    if choice.version is not None and not re.fullmatch(r"\d+(\.\d+)*", choice.version):
        yield f"version is {choice.version!r} of {choice.name}; expected numbers with points, such as '1.23'."
