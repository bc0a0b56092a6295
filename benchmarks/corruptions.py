"""Damage bundles at random, open and verify each in a process of its own, and print how that ended.

    python benchmarks/corruptions.py BUNDLE... --trials 2500

Each trial changes one file of a copy: flipped bits, a cut, bytes added, zeroed, put in or swapped. Half of the trials
write the digests anew, as somebody would who knows how, so that the file itself has to be refused. A trial is good
where it ends in an error of deploykit, in a verification that fails, or in the numbers of the whole bundle.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import deploykit
from deploykit.backends.table import load_backend
from deploykit.bundle import MANIFEST, MANIFEST_DIGEST, read_manifest, write_manifest
from deploykit.errors import DeployKitError
from deploykit.optional import require
from deploykit.parity.metrics import sqnr_db

SECONDS = 10
"""The most processor time that a trial may take."""
HANG_SECONDS = 60
"""A trial that has not ended by then hangs, on a busy machine too."""
MEMORY_MB = 1024
RIGHT_DB = 40.0
"""Numbers this close to the whole bundle's are right: a weight's last bit may have changed."""

WAYS = ("flipped", "cut", "longer", "zeroed", "inserted", "swapped")
GOOD = {"R": "right numbers", "E": "error of deploykit", "F": "verification failed"}
BAD = {"W": "wrong numbers, verified", "U": "another error", "C": "crash or hang", "S": "slow", "M": "memory"}


@dataclass(frozen=True)
class Whole:
    """What the undamaged bundle gives, and the peak memory in KiB that it takes."""

    folder: Path
    outputs: Mapping[str, np.ndarray]
    memory: int


def main() -> None:
    """Print one line a bundle and each trial that ended badly; exit with 1 where one did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--trials", type=int, default=2500, help="of each bundle")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="deploykit-corruptions-") as folder:
        os.environ["DEPLOYKIT_CACHE"] = str(Path(folder, "cache"))
        for bundle in options.bundles:
            chance = random.Random(options.seed)  # noqa: S311  (chance, not secrets)
            bad += damage_often(bundle, options.trials, chance, Path(folder, "copy"))
    sys.exit(bad > 0)


def damage_often(bundle: Path, trials: int, chance: random.Random, copy: Path) -> int:
    """Run the trials of one bundle; return how many ended badly."""
    backend = load_backend(read_manifest(bundle).runtime)
    require(backend.package.module, backend.package)  # imported once, and not by each child
    whole = whole_bundle(bundle, copy.with_name("whole.npz"))
    files = sorted(path.relative_to(bundle) for path in bundle.rglob("*") if path.is_file())
    ends: Counter[str] = Counter()
    slowest, most = 0.0, 0
    for trial in range(trials):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bundle, copy)
        name = chance.choice(files)
        kind, sealed = corrupt(copy / name, chance), chance.random() < 0.5 and seal(copy, copy / name)
        end, seconds, memory = outcome(copy, whole)
        slowest, most = max(slowest, seconds), max(most, memory - whole.memory)
        ends[end] += 1
        if end in BAD:
            print(f"  trial {trial}: {kind} {name}{', digests new' if sealed else ''}: {BAD[end]}", flush=True)
    told = ", ".join(f"{count} {GOOD.get(end) or BAD[end]}" for end, count in ends.most_common())
    print(f"{bundle.name}: {trials} trials: {told}; slowest {slowest:.1f} s, memory {most / 1024:+.0f} MiB", flush=True)
    return sum(ends[end] for end in BAD)


def corrupt(file: Path, chance: random.Random) -> str:
    """Change the bytes of a file in one of six ways; return the way's name."""
    data, kind = bytearray(file.read_bytes()), chance.choice(WAYS)
    size = max(len(data), 1)
    first, second, count = chance.randrange(size), chance.randrange(size), chance.randrange(1, 64)
    if kind == "flipped" and data:
        for _ in range(chance.choice((1, 1, 3, 30))):
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[first:]
    elif kind == "longer":
        data += chance.randbytes(count)
    elif kind == "zeroed":
        data[first : first + count] = bytes(len(data[first : first + count]))
    elif kind == "inserted":
        data[first:first] = chance.randbytes(count)
    else:
        data[first : first + 8], data[second : second + 8] = data[second : second + 8], data[first : first + 8]
    file.write_bytes(data)
    return kind


def seal(bundle: Path, file: Path) -> bool:
    """Write the digests anew after a file was changed; return whether that could be done."""
    if file.name == MANIFEST_DIGEST:
        return False
    if file.name == MANIFEST:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (bundle / MANIFEST_DIGEST).write_text(f"{digest}  {MANIFEST}\n")
        return True
    manifest = read_manifest(bundle)
    for name in (MANIFEST, MANIFEST_DIGEST):
        (bundle / name).unlink()
    write_manifest(bundle, manifest)
    return True


def whole_bundle(bundle: Path, kept: Path) -> Whole:
    """Run the undamaged bundle in a process of its own, as each trial is."""
    child = os.fork()
    if child == 0:
        outputs, _ = used(bundle)
        np.savez(kept, **dict(outputs))
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{bundle} does not open and verify as it is; see above.")
    with np.load(kept) as arrays:
        return Whole(bundle, dict(arrays), usage.ru_maxrss)


def used(bundle: Path) -> tuple[Mapping[str, np.ndarray], bool]:
    """Open, run and verify a bundle; the outputs of one image, and whether it passed."""
    with deploykit.load_bundle(bundle, trust=True) as model:
        image = np.random.default_rng(0).standard_normal(model.input_spec.shape).astype(np.float32)
        outputs = model(image)
    outputs = outputs if isinstance(outputs, Mapping) else {"output": outputs}
    return outputs, deploykit.verify_bundle(bundle, trust=True).passed


def outcome(bundle: Path, whole: Whole) -> tuple[str, float, int]:
    """Use a damaged bundle in a process of its own: a key of `GOOD` or `BAD`, seconds of work, peak memory in KiB."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(HANG_SECONDS)
        os.write(writing, ending(bundle, whole))
        os._exit(0)
    os.close(writing)
    end = os.read(reading, 1).decode() or "C"
    os.close(reading)
    _, _, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    if end in GOOD and seconds > SECONDS:
        end = "S"
    if end in GOOD and usage.ru_maxrss > whole.memory + MEMORY_MB * 1024:
        end = "M"
    return end, seconds, usage.ru_maxrss


def ending(bundle: Path, whole: Whole) -> bytes:
    """How the use of a damaged bundle ends."""
    try:
        outputs, passed = used(bundle)
        same = outputs.keys() == whole.outputs.keys() and all(
            outputs[name].shape == array.shape and sqnr_db(array, outputs[name]) >= RIGHT_DB
            for name, array in whole.outputs.items()
        )
    except DeployKitError:
        return b"E"
    except BaseException:  # any other is what is looked for
        traceback.print_exc()
        return b"U"
    return b"R" if same and passed else b"W" if passed else b"F"


if __name__ == "__main__":
    main()
