"""CONTRIBUTING.md: its tables of where a runtime's name stands are those of the code, its example is a real file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from deploykit.backends.table import BACKENDS, load_backend
from tests.test_structure import FOLDERS, MODULES, NAMED, strings_and_names

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SETTINGS = ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run")


def pinned_version(distribution: str) -> str:
    """The pinned version, under whichever spelling the name has."""
    pins = re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {name.replace("-", "_").lower(): version for name, version in pins}[distribution.replace("-", "_").lower()]


def runtime_rows() -> Iterator[str]:
    yield "| runtime | folder | extra | tested version | its tests |"
    yield "|---|---|---|---|---|"
    for name in BACKENDS:
        package, folder = load_backend(name).package, FOLDERS[name]
        version = f"{package.distribution} {pinned_version(package.distribution)}"
        cells = (name, f"deploykit/backends/{folder}/", package.extra, version, f"tests/backends/{folder}/")
        yield "| " + " | ".join(f"`{cell}`" for cell in cells) + " |"


def file_rows() -> Iterator[str]:
    yield "| file | names |"
    yield "|---|---|"
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in SETTINGS}
    for path in MODULES.values():
        texts[path.relative_to(ROOT).as_posix()] = "\n".join(text for _, text in strings_and_names(path))
    for file, text in sorted(texts.items()):
        own = file.split("/")[2] if file.startswith("deploykit/backends/") else ""
        names = sorted(name for name in NAMED if name in text.lower() and FOLDERS.get(name, name) != own)
        if names:
            yield f"| `{file}` | {', '.join(f'`{name}`' for name in names)} |"


def table_after(sentence: str) -> str:
    """The first table behind a sentence."""
    return re.search(r"^\|.*?(?=^[^|]|\Z)", TEXT[TEXT.index(sentence) :], re.DOTALL | re.MULTILINE)[0].strip()


def test_the_table_of_runtimes_is_the_codes():
    assert table_after("makes both tables from the code") == "\n".join(runtime_rows())


def test_the_table_of_files_that_name_a_runtime_is_the_codes():
    assert table_after("name a runtime in these files alone") == "\n".join(file_rows())


def test_what_the_tables_name_is_there():
    for name, extra in zip(BACKENDS, [load_backend(name).package.extra for name in BACKENDS], strict=True):
        assert (ROOT / "deploykit" / "backends" / FOLDERS[name]).is_dir()
        assert (ROOT / "tests" / "backends" / FOLDERS[name]).is_dir()
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra


def test_the_descriptor_that_it_shows_is_the_one_that_is_tested():
    (shown,) = re.findall(r"^```python\n(BACKEND.*?)```$", TEXT, re.DOTALL | re.MULTILINE)
    assert shown in (ROOT / "tests" / "backends" / "onnx_reference" / "backend.py").read_text()


def test_the_entry_point_group_that_it_shows_is_read():
    from deploykit.backends.table import ENTRY_POINTS

    assert f'[project.entry-points."{ENTRY_POINTS}"]' in TEXT


def test_the_targets_of_make_that_it_names_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z][a-z-]*)", TEXT)) - {"are"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
