"""Kill exports at random moments and look for anything half made that would be opened.

    python benchmarks/kills.py resnet18 --kills 100
    python benchmarks/kills.py resnet18 --kills 100 --cache

Each trial starts ``deploykit export`` (with ``--cache``: ``create_backbone`` of an engine, which is kept in the cache)
in a process group of its own and ends it by SIGKILL after a time drawn between nothing and what a whole one takes, most
often late, when files are written. A bundle that is there afterwards has to open and verify; a cache has to answer with
the numbers of the network. A whole export into the same folder ends each series, and nothing may be left beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import deploykit
from deploykit.errors import DeployKitError

CACHED = """
import sys, numpy as np, torch, deploykit
name, runtime, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
model = deploykit.create_backbone(name, image_size=size, runtime=runtime)
torch.manual_seed(0)
reference = deploykit.create_backbone(name, image_size=size).eval()
image = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
assert np.allclose(model(image), reference(image), rtol=1e-3, atol=1e-4), "other numbers"
"""
LATE = 0.7
"""The share of kills in the last third of the time."""


def main() -> None:
    """Print how many kills left a whole bundle, nothing, or something wrong; exit with 1 for the last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--cache", action="store_true", help="kill a build of the engine cache in place of an export")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deploykit-kills-") as folder:
        os.environ["DEPLOYKIT_CACHE"] = str(Path(folder, "cache"))
        place = Path(folder, "out")
        place.mkdir()
        command = cache_command(options) if options.cache else export_command(options, place / "bundle")
        whole = seconds_of(command)
        clear(place, Path(folder, "cache"))
        chance = random.Random(options.seed)  # noqa: S311  (chance, not secrets)
        ends: Counter[str] = Counter()
        for trial in range(options.kills):
            kill_after(command, moment(chance) * whole)
            end = cache_end(command, trial) if options.cache else bundle_end(place)
            ends[end] += 1
            if end.startswith("wrong"):
                print(f"  kill {trial}: {end}", flush=True)
            if end == "whole":
                clear(place, Path(folder, "cache"))
        run(command)
        left = [path.name for path in place.iterdir() if path.name != "bundle"]
        left += [path.name for path in Path(folder, "cache").rglob("*.partial*")]
    told = ", ".join(f"{count} {end}" for end, count in ends.most_common())
    print(
        f"{options.backbone} {options.runtime}: {options.kills} kills within {whole:.1f} s: {told}; left beside: {left}"
    )
    sys.exit(bool(left) or any(end.startswith("wrong") for end in ends))


def export_command(options: argparse.Namespace, bundle: Path) -> list[str]:
    """The command that writes one bundle, over an older one too."""
    size = ("--image-size", str(options.image_size), "--output", str(bundle), "--overwrite")
    return [sys.executable, "-m", "deploykit", "export", options.backbone, "--runtime", options.runtime, *size]


def cache_command(options: argparse.Namespace) -> list[str]:
    """The command that opens an engine from the cache, or builds it, and compares its numbers."""
    return [sys.executable, "-c", CACHED, options.backbone, options.runtime, str(options.image_size)]


def moment(chance: random.Random) -> float:
    """A share of the whole time; most are late, when files are written."""
    return chance.uniform(2 / 3, 1) if chance.random() < LATE else chance.uniform(0, 2 / 3)


def seconds_of(command: Sequence[str]) -> float:
    """How long the command takes when nobody kills it."""
    started = time.perf_counter()
    run(command)
    return time.perf_counter() - started


def run(command: Sequence[str]) -> None:
    """Run the command to its end.

    Raises:
        SystemExit: it fails, with what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-1500:]}")


def kill_after(command: Sequence[str], seconds: float) -> None:
    """Start the command and kill it and its children at a moment, if it is still there."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def bundle_end(place: Path) -> str:
    """What a killed export left at its place."""
    bundle = place / "bundle"
    if not bundle.exists():
        return "nothing"
    try:
        return "whole" if deploykit.verify_bundle(bundle).passed else "wrong: does not verify"
    except DeployKitError as error:
        return f"wrong: {error}"


def cache_end(command: Sequence[str], trial: int) -> str:
    """What the cache answers after a kill, every tenth time: a build that nobody disturbs takes long."""
    if trial % 10:
        return "not asked"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "whole" if done.returncode == 0 else f"wrong: {done.stderr[-300:]}"


def clear(*folders: Path) -> None:
    """Empty folders."""
    for folder in folders:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        folder.mkdir()


if __name__ == "__main__":
    main()
