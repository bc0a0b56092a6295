"""Verify a bundle many times on this machine and print how often the gate raised a false alarm.

    python benchmarks/verify_reruns.py BUNDLE... --runs 200

Each run opens the engine anew, asks its images in another order, and adds noise that no run had before. ``elsewhere``
is the same with the gate of another processor, which is what a bundle meets when it is shipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import deploykit
from deploykit.verification import Verification


def main() -> None:
    """Print one line a bundle and gate: false alarms, and the least and most of the answer to noise in dB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    for bundle in options.bundles:
        for gate in ("here", "elsewhere"):
            alarms = [fault for _ in range(options.runs) for fault in faults(bundle, gate)]
            print(
                f"{bundle.name} {gate}: {len(alarms)} false alarms in {options.runs} runs {alarms[:2] or ''}",
                flush=True,
            )


def faults(bundle: Path, gate: str) -> list[str]:
    """What one verification finds wrong with an engine that is right."""
    with deploykit.load_bundle(bundle) as model:
        verification = Verification(model)
        if gate == "elsewhere":
            verification.machine = "another"
        report = verification.report()
    return [f"{level.name}: {level.faults or level.sqnr_db}" for level in report.failures()]


if __name__ == "__main__":
    main()
