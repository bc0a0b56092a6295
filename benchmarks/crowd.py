"""Call one engine from many threads, and open one from many processes, and compare every answer.

    python benchmarks/crowd.py BUNDLE... --seconds 60

Sixteen threads call one engine for a minute, each with images of its own, and every answer is compared bit by bit
with that of a single thread; memory is read after the first tenth and at the end. Eight processes open the bundle at
the same moment, and their answers are compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import deploykit

THREADS, PROCESSES, IMAGES = 16, 8, 4
MOST_GROWTH = 0.02


def main() -> None:
    """Print a line a bundle; exit with 1 where an answer differed or memory grew by more than 2%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    bad = False
    for bundle in options.bundles:
        calls, unequal, growth = crowd_of_threads(bundle, options.seconds)
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            answers = pool.map(first_answer, [bundle] * PROCESSES, chunksize=1)
        differing = sum(answer != answers[0] for answer in answers)
        print(
            f"{bundle.name}: {calls} calls of {THREADS} threads, {unequal} unequal, memory {growth:+.1%}; "
            f"{PROCESSES} processes, {differing} unequal",
            flush=True,
        )
        bad = bad or unequal > 0 or differing > 0 or growth > MOST_GROWTH
    sys.exit(bad)


def crowd_of_threads(bundle: Path, seconds: float) -> tuple[int, int, float]:
    """Call one engine from all threads: the calls, those whose answer differed, and the growth of memory."""
    with deploykit.load_bundle(bundle, trust=True) as model:
        chance = np.random.default_rng(0)
        images = [chance.standard_normal(model.input_spec.shape).astype(np.float32) for _ in range(IMAGES)]
        expected = [flat(model(image)) for image in images]
        calls, unequal = [0] * THREADS, [0] * THREADS
        end = time.perf_counter() + seconds

        def call(thread: int) -> None:
            while time.perf_counter() < end:
                index = (thread + calls[thread]) % IMAGES
                unequal[thread] += flat(model(images[index])) != expected[index]
                calls[thread] += 1

        threads = [threading.Thread(target=call, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 10)
        early = resident()
        for thread in threads:
            thread.join()
        return sum(calls), sum(unequal), resident() / early - 1


def first_answer(bundle: Path) -> bytes:
    """Open a bundle and return the bytes that it gives for one image."""
    with deploykit.load_bundle(bundle, trust=True) as model:
        return flat(model(np.random.default_rng(0).standard_normal(model.input_spec.shape).astype(np.float32)))


def flat(outputs: np.ndarray | Mapping[str, np.ndarray]) -> bytes:
    """All bytes of an answer."""
    arrays = outputs.values() if isinstance(outputs, Mapping) else (outputs,)
    return b"".join(array.tobytes() for array in arrays)


def resident() -> int:
    """The resident memory of this process in pages."""
    return int(Path("/proc/self/statm").read_text().split()[1])


if __name__ == "__main__":
    main()
