"""Plant faults at random places of every family's engines: does the gate find them, and the layer walk their node?

    python benchmarks/localize_faults.py --faults 2

Each family's smallest network, with realistic random weights and a feature pyramid behind it, is exported for ONNX
Runtime in FP32, FP16 and INT8. A fault is planted into a copy of the bundle, whose manifest is written again, so that
no digest tells. The gate is `verify_bundle` as it stands; the walk compares with the bundle as it was. A fault that
moves no output by a millionth (a branch of zeros, two equal channels) is drawn again. Of each network an untouched copy
has to pass both first.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from _families import FAMILIES, smooth_images, with_pyramid
from _faults import FAULTS, Fault

from deploykit import export_backbone, verify_bundle
from deploykit.arrays import Array
from deploykit.bundle import MANIFEST, MANIFEST_DIGEST, open_bundle, write_manifest
from deploykit.errors import DeployKitError
from deploykit.export.bundle_layers import engine_graph
from deploykit.export.layer_walk import typed
from deploykit.export.layers import SAME_DB, compare_layers
from deploykit.onnx_session import graph_batch, onnx_session
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import Fp16, Fp32, Int8, Precision

PRECISIONS: dict[str, Precision] = {
    "fp32": Fp32(),
    "fp16": Fp16(min_sqnr_db=20),  # random weights keep less than trained ones
    "int8": Int8(min_sqnr_db=0),
}
SHOWS_DB = 120.0
TRIES = 200


@dataclass
class Tally:
    """How many faults of each kind were planted, found by the gate, and named at their node."""

    planted: Counter[str] = field(default_factory=Counter)
    gate: Counter[str] = field(default_factory=Counter)
    node: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An exported bundle that faults are planted into, and a folder for its wrong copies."""

    bundle: Path
    work: Path
    model: ir.Model
    images: Array

    @classmethod
    def of(cls, bundle: Path, work: Path) -> Subject:
        """Read a bundle."""
        model, images = engine_graph(bundle, open_bundle(bundle))
        return cls(bundle=bundle, work=work, model=typed(model), images=images)

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs that the engine has to give."""
        return [str(value.name) for value in self.model.graph.outputs]

    def passes_gate(self, candidate: ir.Model) -> bool:
        """Whether `verify_bundle` passes a copy of the bundle with this engine."""
        if self.work.exists():
            shutil.rmtree(self.work)
        shutil.copytree(self.bundle, self.work)
        manifest = open_bundle(self.work)
        ir.save(candidate, self.work / manifest.engine)
        for name in (MANIFEST, MANIFEST_DIGEST):
            (self.work / name).unlink()
        write_manifest(self.work, manifest)
        try:
            return verify_bundle(self.work).passed
        except DeployKitError:
            return False

    def culprit(self, candidate: ir.Model) -> str | None:
        """The node that the layer walk names."""
        report = compare_layers(candidate, self.images, reference=self.model, min_own_db=SAME_DB, outputs=self.outputs)
        return None if report.culprit is None else report.culprit.node

    def shows(self, candidate: ir.Model) -> bool:
        """Whether any output is another than the bundle's, in its name or by more than rounding."""
        own = [str(value.name) for value in candidate.graph.outputs]
        if own != self.outputs:
            return True
        size = graph_batch(self.model)
        batches = [self.images[start : start + size] for start in range(0, min(len(self.images), 4), size)]
        before, after = onnx_session(self.model), onnx_session(candidate)
        source = str(self.model.graph.inputs[0].name)
        for batch in batches:
            pairs = zip(before.run(own, {source: batch}), after.run(own, {source: batch}), strict=True)
            if any(one.shape != other.shape or sqnr_db(one, other) < SHOWS_DB for one, other in pairs):
                return True
        return False

    def plant(self, fault: Fault, generator: np.random.Generator) -> tuple[ir.Model, set[str], str] | None:
        """Return a copy with the fault somewhere, the nodes that may be named, and the place; None: it has none."""
        nodes = list(self.model.graph)
        places = [place for place, node in enumerate(nodes) if not fault.operators or node.op_type in fault.operators]
        for place in generator.permutation(places)[:TRIES]:
            candidate = self.model.clone()
            node = candidate.graph.node(int(place))
            name = str(node.name)
            expected = fault.plant(candidate, node, self.images)
            if expected and self.shows(candidate):
                return candidate, expected, name
        return None


def export(name: str, precision: Precision, folder: Path) -> Path:
    """Export a family's network with a feature pyramid."""
    images = smooth_images(FAMILIES[name])
    export_backbone(
        with_pyramid(name), folder, runtime="onnxruntime", precision=precision, calibration=images, overwrite=True
    )
    return folder


def trials(subject: Subject, kinds: Sequence[Fault], count: int, generator: np.random.Generator, label: str) -> Tally:
    """Plant faults of each kind and look for them; misses are printed."""
    tally = Tally()
    untouched = subject.model.clone()
    if not subject.passes_gate(untouched) or subject.culprit(untouched) is not None:
        sys.exit(f"{label}: a false alarm, on the engine as it was exported")
    for fault in kinds:
        for _ in range(count):
            planted = subject.plant(fault, generator)
            if planted is None:
                break
            candidate, expected, place = planted
            tally.planted[fault.name] += 1
            if subject.passes_gate(candidate):
                print(f"  {label}: {fault.name} at {place}: the gate missed it", flush=True)
            else:
                tally.gate[fault.name] += 1
            named = subject.culprit(candidate)
            if named in expected:
                tally.node[fault.name] += 1
            else:
                print(f"  {label}: {fault.name} at {place}: the walk named {named}", flush=True)
    return tally


def table(found: dict[str, Tally]) -> str:
    """Return the counts as a table in Markdown: a row a kind, a column a precision."""
    lines = [f"| fault | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for name in [fault.name for fault in FAULTS]:
        cells = [
            f"{tally.gate[name]}, {tally.node[name]} of {tally.planted[name]}" if tally.planted[name] else ""
            for tally in found.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = [f"{tally.gate.total()}, {tally.node.total()} of {tally.planted.total()}" for tally in found.values()]
    return "\n".join([*lines, f"| **all** | {' | '.join(totals)} |"])


def main() -> None:
    """Export, plant, look, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="NAME")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--faults", type=int, default=1, help="of each kind, for each network and precision")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    generator = np.random.default_rng(arguments.seed)
    found = {name: Tally() for name in arguments.precisions}
    with tempfile.TemporaryDirectory() as folder:
        for network in arguments.networks:
            for name, total in found.items():
                label = f"{network} {name}"
                bundle = export(network, PRECISIONS[name], Path(folder) / "bundle")
                subject = Subject.of(bundle, Path(folder) / "wrong")
                tally = trials(subject, FAULTS, arguments.faults, generator, label)
                counts = f"{tally.gate.total()} found, {tally.node.total()} at their node"
                print(f"{label}: {tally.planted.total()} planted, {counts}", flush=True)
                for own, other in ((total.planted, tally.planted), (total.gate, tally.gate), (total.node, tally.node)):
                    own.update(other)
            print(f"\nfound by the gate, named at their node, of those planted so far\n\n{table(found)}\n", flush=True)


if __name__ == "__main__":
    main()
