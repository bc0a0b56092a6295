"""Networks of timm of other kinds than deploykit's families: do they convert, and is INT8 faster than FP32?

Each is exported as ``timm/<name>`` to ONNX Runtime and OpenVINO, at FP32 and at INT8 with the settings that an export
has by default, and compared with torch FP32 on crops of photographs that it was not calibrated with. Times are medians
over rounds in which the engines of a network take turns in one process, and so are the ratios.

All weights are random: BatchNorms have the statistics of the calibration crops, other norms and layer scales are drawn
from ranges that training gives. So decibels tell a wrong conversion from a right one, and nothing of a trained
network's INT8 accuracy. A network takes 1 to 3 minutes on 2 cores.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from _engines import Engines, published
from _from_tests import realistic, settle
from _planned import Network
from _results import machine_line, parser, save, silence
from _timing import RUNTIMES, outputs_of, turns
from torch import nn

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.timm_models import PREFIX, build_timm
from deploykit.errors import DeployKitError
from deploykit.parity.metrics import sqnr_db

NETWORKS = (
    "mobileone_s0",
    "repvgg_a0",
    "fastvit_t8",
    "repvit_m1",
    "mixnet_s",
    "levit_128s",
    "ghostnet_100",
    "tinynet_a",
    "mnasnet_100",
    "mobilenetv4_conv_small",
    "starnet_s1",
    "efficientvit_b0",
    "edgenext_xx_small",
    "efficientformer_l1",
    "pvt_v2_b0",
    "xcit_nano_12_p16_224",
    "poolformer_s12",
    "ese_vovnet19b_dw",
    "hrnet_w18_small",
    "dla34",
    "res2net50_26w_4s",
    "eca_nfnet_l0",
    "densenet121",
)
QUICK = ("mobileone_s0", "repvgg_a0", "mixnet_s")
FP32, INT8 = "fp32", "int8"
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
SLOWER = 1.02
"""The ratio of INT8's time to FP32's from which a row is marked: less is the noise of a shared machine."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network in one runtime: medians in ms, ``ratio`` of each round's INT8 time to its FP32 time, dB of logits."""

    network: str
    runtime: str
    fp32_ms: float
    int8_ms: float
    ratio: float
    fp32_db: float
    int8_db: float


@dataclass(kw_only=True, eq=False)
class ZooEngines(Engines):
    """The engines of a timm model."""

    @cached_property
    def network(self) -> Network:
        """The model with random weights, and crops for it."""
        torch.manual_seed(0)
        backbone = build_timm(self.name, BackboneOptions())
        network, kept = Network.of(backbone, self.images, self.images), self.folder / "weights.pt"
        if kept.exists():  # settled anew, in other threads, they would differ from those of the engines that are kept
            backbone.load_state_dict(torch.load(kept, weights_only=True))
            return network
        if any(isinstance(module, NORMS) for module in backbone.modules()):
            # A network that normalizes nothing keeps the gains that it was made with.
            settle(realistic(backbone), torch.from_numpy(network.calibrated))
        published(lambda staging: torch.save(backbone.state_dict(), staging), kept)
        return network


def measure(name: str, work: Path, images: int, rounds: int) -> list[Row]:
    """Export a network to both runtimes at both precisions, and let the four engines take turns.

    Raises:
        DeployKitError: it does not convert.
    """
    engines = ZooEngines(name=name, folder=work / f"{name}-{images}", images=images)
    network = engines.network
    calls = {
        f"{runtime} {precision}": open_graph(engines.engine(runtime, precision))
        for runtime, open_graph in RUNTIMES.items()
        for precision in (FP32, INT8)
    }
    kept = {key: sqnr_db(engines.expected, outputs_of(call, network.evaluated)[-1]) for key, call in calls.items()}
    times = turns(calls, network.calibrated[:1], rounds)
    rows = []
    for runtime in RUNTIMES:
        before, after = times[f"{runtime} {FP32}"], times[f"{runtime} {INT8}"]
        rows.append(
            Row(
                network=name,
                runtime=runtime,
                fp32_ms=statistics.median(before),
                int8_ms=statistics.median(after),
                ratio=statistics.median(two / one for one, two in zip(before, after, strict=True)),
                fp32_db=kept[f"{runtime} {FP32}"],
                int8_db=kept[f"{runtime} {INT8}"],
            )
        )
    return rows


def head() -> str:
    """Return the head of the table."""
    heads = ("FP32 ms", "INT8 ms", "INT8/FP32", "FP32 dB", "INT8 dB")
    return f"{'network':<24}{'runtime':<13}" + "".join(f"{head:>10}" for head in heads)


def line(row: Row) -> str:
    """Return a row of the table, marked where INT8 is slower."""
    mark = "  slower" if row.ratio > SLOWER else ""
    times = f"{row.fp32_ms:10.2f}{row.int8_ms:10.2f}{row.ratio:10.3f}"
    return f"{row.network:<24}{row.runtime:<13}{times}{row.fp32_db:10.1f}{row.int8_db:10.1f}{mark}"


def summarize(rows: Sequence[Row]) -> None:
    """Print the geometric mean of the ratios of each runtime, and how many networks are slower at INT8."""
    for runtime in RUNTIMES:
        ratios = [row.ratio for row in rows if row.runtime == runtime]
        if ratios:
            slower = sum(ratio > SLOWER for ratio in ratios)
            mean = statistics.geometric_mean(ratios)
            print(f"{'geometric mean':<24}{runtime:<13}{'':20}{mean:10.3f}  {slower} of {len(ratios)} slower")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the networks that are asked for; those that fail are named at the end."""
    options = parser(__doc__)
    options.add_argument("--networks", nargs="+", metavar="NAME", help="models of timm (default: the table's)")
    options.add_argument("--rounds", type=int, help="timed rounds (default: 40; 15 with --quick)")
    options.add_argument("--images", type=int, help="calibration and other crops (default: 24; 8 with --quick)")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep engines here (default: a temporary folder)")
    asked = options.parse_args(arguments)
    silence()
    images, rounds = asked.images or (8 if asked.quick else 24), asked.rounds or (15 if asked.quick else 40)
    print(machine_line())
    print(f"random weights; calibrated on {images} crops, compared on {images} others; {rounds} rounds in turns")
    print(head())
    rows, failures = [], {}
    with tempfile.TemporaryDirectory(prefix="deploykit-zoo-") as scratch:
        for name in [name.removeprefix(PREFIX) for name in asked.networks or (QUICK if asked.quick else NETWORKS)]:
            try:
                found = measure(name, asked.work or Path(scratch), images, rounds)
            except DeployKitError as error:
                failures[name] = str(error)
                continue
            rows += found
            print("\n".join(map(line, found)), flush=True)
    summarize(rows)
    save(asked.json, rows=rows, failures=failures)
    if failures:
        raise SystemExit("\n".join(["not converted:", *(f"{name}: {why}" for name, why in failures.items())]))


if __name__ == "__main__":
    main()
