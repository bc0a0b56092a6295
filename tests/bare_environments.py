"""Open bundles where nothing but deploykit's wheel and one runtime is installed: ``make test-matrix``.

For each Python that is there, one environment for each runtime in the newest and in the oldest allowed versions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUNDLES = ROOT / "tests" / "data" / "bundles-0.1.0"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
RUNTIMES = {"onnxruntime": "onnxruntime-int8", "openvino": "openvino-int8"}
PURE = ("deploykit", "deploykit_vision", "msgspec")
"""Folders of our own part and of our pure dependencies, whose size has a limit."""
MOST_MEGABYTES = 15

PROBE = """
import importlib.metadata, json, sys, time, warnings
warnings.simplefilter("ignore")
start = time.perf_counter()
import deploykit
imported = time.perf_counter() - start
import numpy
start = time.perf_counter()
with deploykit.load_bundle(sys.argv[1]) as model:
    model(numpy.zeros(model.input_spec.shape, numpy.float32))
first = time.perf_counter() - start
report = deploykit.verify_bundle(sys.argv[1])
heavy = sorted({"torch", "onnx", "PIL", "typer", "rich", "platformdirs"} & set(sys.modules))
versions = {name: importlib.metadata.version(name) for name in (sys.argv[2], "numpy", "msgspec")}
print(json.dumps({"passed": report.passed, "worst": min(level.sqnr_db for level in report.levels), "heavy": heavy,
                  "import_ms": imported * 1e3, "first_ms": first * 1e3, "versions": versions}))
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one environment gave; ``problem`` is empty where all is well, ``untried`` says why it was not tried."""

    python: str
    runtime: str
    versions: str
    problem: str = ""
    untried: str = ""
    figures: str = ""


def find_pythons() -> dict[str, str]:
    """Return the interpreters that are on the path or below ``~/.pyenv``, by version."""
    found = {}
    for version in PYTHONS:
        kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
        path = str(kept[-1]) if kept else shutil.which(f"python{version}")
        if path is not None:
            found[version] = path
    return found


def oldest_versions(runtime: str) -> list[str]:
    """Return the oldest versions that pyproject.toml allows of what a device installs, as pip takes them."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', project))
    return [f"{name}=={least[name]}.*" for name in ("numpy", "msgspec", runtime)]


def build_wheel(folder: Path) -> Path:
    """Build the wheel into a folder."""
    run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)])
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(command: Sequence[str]) -> str:
    """Run a command; its output, or the end of what it said where it failed, as an error."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir(), env=clean)
    if done.returncode != 0:
        raise RuntimeError(" ".join((done.stderr or done.stdout).strip().splitlines()[-1:]))
    return done.stdout


def try_one(python: str, runtime: str, wheel: Path, folder: Path, *, oldest: bool) -> dict[str, object]:
    """Make one environment and open the runtime's bundle in it.

    Raises:
        RuntimeError: it cannot be made, or the bundle does not open.
    """
    run([python, "-m", "venv", str(folder)])
    own = str(folder / "bin" / "python")
    pins = oldest_versions(runtime) if oldest else []
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    run([*install, f"{wheel}[{runtime}]", *pins])
    told: dict[str, object] = json.loads(run([own, "-c", PROBE, str(BUNDLES / RUNTIMES[runtime]), runtime]))
    told["megabytes"] = sum(size_of(part) for part in folder.rglob("site-packages/*") if part.name in PURE) / 1e6
    return told


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files, without what Python compiled."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def problems_of(told: dict[str, object]) -> str:
    """Say what is wrong with what an environment gave."""
    found = [] if told["passed"] else [f"outside its budget: {told['worst']:.1f} dB"]
    found += [f"imported {', '.join(told['heavy'])}"] if told["heavy"] else []
    found += [f"{told['megabytes']:.1f} MB of our own"] if told["megabytes"] > MOST_MEGABYTES else []
    return "; ".join(found)


def rows(pythons: dict[str, str], runtimes: Sequence[str]) -> Iterator[Row]:
    """Try every combination; yield each as it is done."""
    with tempfile.TemporaryDirectory(prefix="bare-") as scratch:
        wheel = build_wheel(Path(scratch) / "wheel")
        for version, python in pythons.items():
            for runtime in runtimes:
                for oldest in (False, True):
                    label = "oldest" if oldest else "newest"
                    folder = Path(scratch) / f"{version}-{runtime}-{label}"
                    try:
                        told = try_one(python, runtime, wheel, folder, oldest=oldest)
                    except RuntimeError as error:
                        absent = "No matching distribution" in str(error) or "ResolutionImpossible" in str(error)
                        untried = absent and oldest
                        yield Row(
                            python=version,
                            runtime=runtime,
                            versions=label,
                            problem="" if untried else str(error),
                            untried="no wheels of these versions together" if untried else "",
                        )
                        continue
                    finally:
                        shutil.rmtree(folder, ignore_errors=True)
                    names = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
                    figures = (
                        f"{names}; {told['worst']:.1f} dB, import {told['import_ms']:.0f} ms, open to first result "
                        f"{told['first_ms']:.0f} ms, {told['megabytes']:.1f} MB of our own"
                    )
                    yield Row(
                        python=version, runtime=runtime, versions=label, problem=problems_of(told), figures=figures
                    )


def main() -> int:
    """Print a line for each environment; returns 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this one; give it again for more")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="only this one; give it again for more")
    chosen = parser.parse_args()
    pythons = {version: path for version, path in find_pythons().items() if version in (chosen.python or PYTHONS)}
    failed, ran = 0, 0
    for row in rows(pythons, chosen.runtime or tuple(RUNTIMES)):
        failed += bool(row.problem)
        state = f"FAILED: {row.problem}" if row.problem else f"not tried: {row.untried}" if row.untried else "ok"
        ran += not row.untried
        figures = f" ({row.figures})" if row.figures else ""
        print(f"python {row.python} {row.runtime} {row.versions}: {state}{figures}", flush=True)  # noqa: T201
    absent = [version for version in PYTHONS if version not in find_pythons()]
    if absent:
        print(f"not here, and so not tried: Python {', '.join(absent)}")  # noqa: T201
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
