"""The quantization plan: what calibration found, once, for every runtime's dialect to render."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray
from deploykit.bundle_files import PLAN_FILE, SHIFT_FILE
from deploykit.calibration.instrumented import Instrumented
from deploykit.calibration.placement import Placement, without
from deploykit.calibration.ranges import STATISTICS_VERSION, ActivationRange, TensorStatistics, quantize_weight
from deploykit.calibration.rounded_weight import RoundedWeight
from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError
from deploykit.npz import read_npz
from deploykit.onnx_values import tensor_of
from deploykit.plain_files import digest_of, open_plain, read_plain
from deploykit.spec import FloatDtype, Int8

SCHEMA_VERSION = 2
"""From version 2 on a plan carries the digest of both its files; version 1 is still read, unproved."""
DISTILLATION_VERSION = 3
"""Part of the key of a plan that was tuned: what is learned otherwise is another plan."""

IMPORTED = "imported"
"""What the plan of another tool's model says instead of a calibrator."""
MOST_PLAN_BYTES = 64 << 20
MOST_ARRAY_BYTES = 1 << 30
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """Ranges and placement for one network, from one set of images.

    ``key`` is the digest of the weights, the images with their preprocessing, and the settings;
    ``weights_digest`` is that of the backbone's weights, ``constants_digest`` that of the master graph's,
    which fusion and equalization have changed. ``warnings`` say what was wrong with the images.
    ``bias_shift`` maps a node to the ``(channels,)`` mean error that rounding its weight makes in
    its output, which a dialect adds to the bias. ``weights`` maps a node to how its weight was rounded,
    where that is not to the nearest. ``float_dtype`` is what the rest computes in.
    ``reduce_range``: the weights are such that no product saturates where two are added in 16 bits.
    ``statistics`` are what was seen of each tensor: no dialect reads them, people do. ``digest`` is that of the saved
    files, with zeros in its own place.
    """

    schema_version: int = SCHEMA_VERSION
    digest: str = _NO_DIGEST
    key: str
    weights_digest: str = ""
    constants_digest: str = ""
    calibrator: str
    images: int
    warnings: tuple[str, ...] = ()
    reduce_range: bool = False
    float_dtype: FloatDtype = "fp32"
    placement: Placement
    ranges: dict[str, ActivationRange]
    statistics: dict[str, TensorStatistics] = field(default_factory=dict)
    bias_shift: dict[str, FloatArray] = field(default_factory=dict)
    weights: dict[str, RoundedWeight] = field(default_factory=dict)

    def integers_of(
        self, node: str, weight: FloatArray, axis: int, least: FloatArray | None = None
    ) -> tuple[npt.NDArray[np.int8], FloatArray]:
        """Return a node's weight in integers with one scale a channel of ``axis``: the same in every dialect.

        Args:
            node: the node that reads it.
            weight: the constant of the master graph.
            axis: that of its output channels.
            least: the smallest scale that each channel may have, ``(channels,)``.
        """
        chosen = self.weights.get(node)
        if chosen is not None:
            return chosen.integers_of(weight, axis, least, reduce_range=self.reduce_range)
        return quantize_weight(weight, axis, least, reduce_range=self.reduce_range)

    @property
    def imported(self) -> bool:
        """Whether the plan is another tool's, whose placement is kept: nothing is left in float for speed."""
        return self.calibrator == IMPORTED

    def range_of(self, tensor: str) -> ActivationRange:
        """Return the range of a tensor, or of the tensor whose range it shares."""
        return self.ranges[self.placement.same_range.get(tensor, tensor)]

    def without(self, model: ir.Model, nodes: Mapping[str, str]) -> QuantizationPlan:
        """Return the plan with some nodes in float, each with its reason.

        Raises:
            CalibrationError: a node does not run in integers.
        """
        placement = self._with_own_ranges(without(model, self.placement, nodes))
        ranges = self.ranges | {name: self.range_of(name) for name in placement.tensors}
        return replace(self, placement=placement, ranges=ranges)

    def _with_own_ranges(self, placement: Placement) -> Placement:
        """Return a placement as far as the plan has ranges, each tensor with that of its own."""
        shared = {pooled: of for pooled, of in placement.same_range.items() if pooled not in self.ranges}
        known = {name for name in placement.tensors if self.placement.same_range.get(name, name) in self.ranges}
        own = {pooled for pooled in placement.same_range if pooled in self.ranges}
        return replace(placement, same_range=shared).limited_to(known | own)

    def check_fits(self, model: ir.Model, weights_digest: str) -> None:
        """Refuse a plan that was made for another network.

        Raises:
            CalibrationError: it was made for other weights, or for a graph with other constants.
        """
        remedy = "Calibrate again, or give the plan of these weights."
        found = constants_digest(model)
        if self.weights_digest != weights_digest:
            raise CalibrationError(
                f"the plan was made for weights of digest {self.weights_digest or 'unknown'}, and these weights have "
                f"digest {weights_digest}. {remedy}"
            )
        if self.constants_digest != found:
            raise CalibrationError(
                f"the plan was made for a graph whose constants have digest {self.constants_digest or 'unknown'}, and "
                f"this graph's have {found}: the weights are the same, and the options of the backbone or its "
                f"equalization are not. {remedy} Where its recipe equalizes, give the images that the plan was "
                "made of, and the same precision."
            )

    def save(self, folder: Path) -> None:
        """Write the plan into ``folder``: `PLAN_FILE` to read, and bias shifts and roundings in `SHIFT_FILE`."""
        arrays: dict[str, Array] = {f"bias_shift:{node}": shift for node, shift in self.bias_shift.items()}
        for node, chosen in self.weights.items():
            arrays |= {f"steps:{node}": chosen.steps, f"scales:{node}": chosen.scales}
        np.savez_compressed(folder / SHIFT_FILE, allow_pickle=False, **arrays)
        readable = replace(self, schema_version=SCHEMA_VERSION, digest=_NO_DIGEST, bias_shift={}, weights={})
        text = msgspec.json.format(msgspec.json.encode(readable), indent=1) + b"\n"
        digest = _files_digest(text, folder / SHIFT_FILE)
        (folder / PLAN_FILE).write_bytes(text.replace(_NO_DIGEST.encode(), digest.encode(), 1))

    @staticmethod
    def load(folder: Path) -> QuantizationPlan:
        """Read a plan that `save` wrote.

        Raises:
            CalibrationError: a file is missing, changed, or not a plan of this schema.
        """
        try:
            text = read_plain(folder / PLAN_FILE, MOST_PLAN_BYTES)
            _check_digest(text, folder / SHIFT_FILE)
            plan = msgspec.json.decode(text, type=QuantizationPlan)
            shifts, weights = _split_kinds(read_npz(folder / SHIFT_FILE, limit=MOST_ARRAY_BYTES))
            return replace(plan, schema_version=SCHEMA_VERSION, digest=_NO_DIGEST, bias_shift=shifts, weights=weights)
        except (OSError, ValueError, KeyError, RecursionError, msgspec.MsgspecError) as error:
            raise CalibrationError(
                f"{folder}: {PLAN_FILE} or {SHIFT_FILE} is not readable ({error}). Calibrate again."
            ) from error


def _split_kinds(arrays: Mapping[str, Array]) -> tuple[dict[str, FloatArray], dict[str, RoundedWeight]]:
    """Split the arrays of `SHIFT_FILE` into bias shifts and roundings, by node.

    Raises:
        KeyError: an array of another kind, or steps without their scales.
    """
    shifts: dict[str, FloatArray] = {}
    scales: dict[str, FloatArray] = {}
    steps: dict[str, npt.NDArray[np.int8]] = {}
    for name, array in arrays.items():
        kind, _, node = name.partition(":")
        if kind == "steps":
            steps[node] = array.astype(np.int8, copy=False)
        else:
            {"bias_shift": shifts, "scales": scales}[kind][node] = array.astype(np.float32, copy=False)
    return shifts, {node: RoundedWeight(steps=few, scales=scales[node]) for node, few in steps.items()}


def _check_digest(text: bytes, arrays: Path) -> None:
    """Refuse a plan whose files are not those that were saved.

    Raises:
        ValueError: they are not, or it is of another schema.
    """
    raw = msgspec.json.decode(text)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version == 1 and "digest" not in raw:
        return
    if version != SCHEMA_VERSION:
        raise ValueError(f"its schema_version is {version!r}; expected 1 to {SCHEMA_VERSION}")
    found = _DIGEST.search(text)
    if found is None or found[1].decode() != _files_digest(text.replace(found[1], _NO_DIGEST.encode(), 1), arrays):
        raise ValueError("its files do not match its digest")


def _files_digest(text: bytes, arrays: Path) -> str:
    """Return SHA-256 over a plan's text, with zeros for the digest, and its arrays' file."""
    with open_plain(arrays) as file:
        return hashlib.sha256(text + digest_of(file).encode()).hexdigest()


def constants_digest(model: ir.Model) -> str:
    """Return SHA-256 over the names and values of a graph's constants, whatever the batch that it takes."""
    digest = hashlib.sha256()
    for _, value in sorted(model.graph.initializers.items()):
        digest.update(ir.to_proto(tensor_of(value)).SerializeToString(deterministic=True))
    return digest.hexdigest()


def plan_key(weights_digest: str, images_digest: str, settings: Int8, *, tuned_for: str | None = None) -> str:
    """Return the key of a plan: equal keys give equal plans.

    Args:
        weights_digest: the digest of the backbone's weights.
        images_digest: the digest of the calibration images.
        settings: filled or not.
        tuned_for: the runtime that the plan is tuned for, where it is tuned for one.
    """
    settings = settings.filled()
    statistics = f"statistics {STATISTICS_VERSION}"
    text = "\n".join((weights_digest, images_digest, statistics, str(settings.calibrator), str(settings.percentile)))
    parts = (settings.bias_correction, settings.equalization, settings.float_dtype, bool(settings.reduce_range))
    switches = "\n".join(map(str, (*parts, settings.rounding, settings.weight_scales)))
    if settings.rounding == "distilled":
        tuning = (
            DISTILLATION_VERSION,
            settings.distill_steps,
            settings.distill_minutes,
            settings.distill_seed,
            tuned_for,
        )
        switches += "\n".join(map(str, tuning))
    if settings.by_nncf and settings.mixed_precision:
        switches += f"\n{settings.min_sqnr_db}"  # what NNCF's accuracy control goes by
    return hashlib.sha256(f"{text}\n{switches}".encode()).hexdigest()


def calibrate(
    model: ir.Model,
    batches: Iterable[FloatArray],
    settings: Int8,
    *,
    key: str,
    weights_digest: str = "",
    started: Statistics | None = None,
    on_batch: Callable[[Statistics], None] | None = None,
) -> QuantizationPlan:
    """Run the master graph over the images once and choose every range.

    Args:
        model: the FP32 master graph.
        batches: ``(N, C, H, W)`` float32 batches of the size that the graph takes.
        settings: the calibrator and whether to correct biases.
        key: what the plan is keyed by, from `plan_key`.
        weights_digest: the digest of the weights, by which the plan is refused for others.
        started: where to add what is found: `Statistics` that know how images are normalised check them, and
            those of a stopped pass go on, with ``batches`` from there; None: new ones that check nothing.
        on_batch: called with what has been found so far, after each batch.

    Raises:
        CalibrationError: no images, or activations that are not finite.
        MissingDependency: onnxruntime, which runs the graph, is not installed.
    """
    settings = settings.filled()
    network, statistics = Instrumented(model, settings), started or Statistics()
    for batch in batches:
        statistics.update(batch, *network.observe(batch))
        if on_batch:
            on_batch(statistics)
    if not statistics.images:
        raise CalibrationError("the calibration set gave no images; expected at least one.")
    plan = _chosen(network.placement, statistics, settings, key=key, constants=constants_digest(model))
    return replace(plan, weights_digest=weights_digest, bias_shift=network.bias_shifts(statistics))


def _chosen(
    placement: Placement, statistics: Statistics, settings: Int8, *, key: str, constants: str
) -> QuantizationPlan:
    """Choose every range from what was seen."""
    ranges = {name: statistics.histograms[name].choose(settings) for name in placement.tensors}
    return QuantizationPlan(
        key=key,
        constants_digest=constants,
        calibrator=str(settings.calibrator),
        images=statistics.images,
        warnings=statistics.checks.problems() if statistics.checks else (),
        reduce_range=bool(settings.reduce_range),
        float_dtype=settings.float_dtype,
        placement=placement,
        ranges=ranges,
        statistics={name: statistics.histograms[name].statistics(chosen) for name, chosen in ranges.items()},
    )
