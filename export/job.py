"""One export: a backbone, the images, and the options; checked before any work."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import deploykit
from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.weights import weights_digest
from deploykit.backends.backend import Backend, resolve
from deploykit.backends.table import EVALUATOR, engine_names, load_backend
from deploykit.bundle import Manifest
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision import check_images_given
from deploykit.calibration.ranges import STATISTICS_VERSION
from deploykit.calibration.recipes import with_recipe
from deploykit.errors import SpecError, nearest
from deploykit.export.network_digest import network_digest
from deploykit.export.target_options import backend_for, is_here
from deploykit.manifest import MadeFor
from deploykit.optional import installed_version, require
from deploykit.options import ExportOptions
from deploykit.processor import saturates
from deploykit.spec import DEFAULT_BUILD, Fp32, InputSpec, Int8
from deploykit.target import known_names

if TYPE_CHECKING:
    from deploykit.export.qat import QatNetwork

_TOOLS = ("torch", "onnx", "onnx_ir", "onnxscript")


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """What to export; `checked` gives the job with what its options leave to the target decided.

    ``labels`` are the class names that the bundle carries, in the order of the logits; None: those of the backbone.
    ``plan`` is an INT8 plan that was made before; None: one is made of the images. ``trained`` is the backbone after
    quantization-aware training: its weights and ranges are exported, and the engine is compared with it.
    """

    backbone: BaseBackbone
    options: ExportOptions
    images: CalibrationSet | None = None
    labels: tuple[str, ...] | None = None
    plan: QuantizationPlan | None = None
    trained: QatNetwork | None = None

    @property
    def backend(self) -> Backend:
        """The descriptor of the engine's runtime, on the device of its target."""
        return backend_for(self.options)

    @property
    def weights_digest(self) -> str:
        """The digest of the weights that are exported."""
        return weights_digest(self.backbone if self.trained is None else self.trained)

    @property
    def input(self) -> InputSpec:
        """The engine's input: the backbone's with the batch asked for, as pixels where it embeds preprocessing."""
        spec = replace(self.backbone.input_spec, batch=self.options.batch)
        return spec.as_pixels() if self.options.embed_preprocessing else spec

    @property
    def title(self) -> str:
        """What people call the engine: backbone, runtime, precision."""
        return f"{self.backbone.spec.name} {self.options.runtime} {self.options.precision.name}"

    def differs_from(self, manifest: Manifest) -> str | None:
        """Say how a built engine differs from the one that is asked for; None: it does not."""
        asked = {
            "backbone": (self.backbone.spec, manifest.backbone),
            "weights": (self.weights_digest, manifest.weights_digest),
            "runtime": (self.options.runtime, manifest.runtime),
            "precision": (self.options.precision.name, manifest.precision),
            "input": (self.input, manifest.input),
            "target": (self.options.target_name, manifest.target),
        }
        other = [name for name, (wanted, found) in asked.items() if wanted != found]
        return f"it is an engine with another {' and '.join(other)}" if other else None

    @property
    def made_for(self) -> MadeFor | None:
        """What the manifest says of the device that the engine is for."""
        target = self.options.made_for
        if target is None:
            return None
        choice = target.choice(self.options.runtime)
        return MadeFor(
            name=target.name,
            title=target.title,
            machine=target.machine,
            instructions=target.instructions,
            device=choice.device,
            options=choice.options,
            memory_mb=target.memory_mb,
        )

    @property
    def is_elsewhere(self) -> bool:
        """Whether the engine is for another machine than this one, which then says nothing of its speed."""
        target = self.options.made_for
        return target is not None and not is_here(target)

    def with_precision(self, precision: Int8, images: CalibrationSet | None = None) -> ExportJob:
        """Return the job with other INT8 settings, and other images where some are given."""
        return replace(self, options=replace(self.options, precision=precision), images=images or self.images)

    def without_cache(self) -> ExportJob:
        """Return the job that neither uses nor keeps plans."""
        return replace(self, options=replace(self.options, cache=False))

    def cache_parts(self) -> dict[str, object]:
        """Return all that decides an engine's bytes, for the key of the engine cache."""
        options = self.options
        return {
            "backbone": asdict(self.backbone.spec),
            "weights": self.weights_digest,
            "network": network_digest(self.backbone, self.input.as_images()),
            "input": asdict(self.input),
            "runtime": options.runtime,
            "runtime_version": self.backend.installed_version(),
            "tie": self.backend.machine_tie(),
            "precision": [options.precision.name, {k: str(v) for k, v in asdict(options.precision).items()}],
            "batch": options.batch if isinstance(options.batch, int) else asdict(options.batch),
            "calibration": self.images.digest if self.images is not None else None,
            "target": options.target,
            "made_for": options.made_for,
            "labels": self.labels,
            "portable": options.portable,
            "build_options": options.build,
            "tools": tool_versions(),
            "statistics": STATISTICS_VERSION,
            "deploykit": deploykit.__version__,
        }


def checked(job: ExportJob) -> ExportJob:
    """Refuse what the runtime cannot make, before any work; settle what the options leave to the target.

    Raises:
        SpecError: an unknown runtime, one that has no engines, or an option or precision that it lacks.
        CalibrationError: INT8 without images.
        MissingDependency: the runtime's package is not installed.
    """
    options, backend = job.options, job.backend
    if not backend.has_engines:
        raise SpecError(
            f"the {backend.name} runtime is the module itself and has no engine to export. "
            f"Choose a runtime: {', '.join(engine_names())}."
        )
    backend.check_installed()
    _check_sizes(backend, job)
    _check_batch(backend, options)
    _check_ray(options)
    _check_target(backend, options)
    _check_build(backend, options)
    job = replace(job, options=_settled(options, backend))
    _check_precision(backend, job)
    if job.plan is None and job.trained is None:
        check_images_given(job.options.precision, job.images)
    return job


def tool_versions() -> dict[str, str]:
    """Return the packages that a master graph depends on, with their versions."""
    names = (*_TOOLS, load_backend(EVALUATOR).package.module)
    return {name: version for name in names if (version := installed_version(name))}


def _settled(options: ExportOptions, backend: Backend) -> ExportOptions:
    """Decide whether 8-bit weights would saturate on the target, where the options leave that open."""
    precision = options.precision
    processor = options.made_for.processor if options.made_for is not None else options.target
    if not isinstance(precision, Int8) or precision.reduce_range is not None:
        return options
    return replace(options, precision=replace(precision, reduce_range=backend.uses_cpu and saturates(processor)))


def _check_sizes(backend: Backend, job: ExportJob) -> None:
    sizes = job.backbone.input_spec.sizes
    if sizes is None:
        return
    if not backend.image_sizes:
        having = [name for name in engine_names() if load_backend(name).image_sizes]
        raise SpecError(
            f"image_size is the range {sizes}, and engines of {backend.name} take one size. Give one size, or choose "
            f"a runtime that takes a range: {', '.join(having)}."
        )
    if job.trained is not None:
        raise SpecError(
            f"image_size is the range {sizes}, and a network after quantization-aware training is exported for one "
            "size. Give one size to prepare_qat."
        )


def _check_batch(backend: Backend, options: ExportOptions) -> None:
    if not backend.batches and not isinstance(options.batch, int):
        raise SpecError(
            f"batch_size is {options.batch}, and engines of {backend.title} take one batch size. Give a number of "
            "images."
        )


def _check_ray(options: ExportOptions) -> None:
    if options.workers is not None and not options.ray:
        raise SpecError(f"workers is {options.workers!r}, and ray is off. Leave it out, or add ray=True.")
    if options.ray:
        require("ray.data")


def _check_target(backend: Backend, options: ExportOptions) -> None:
    target = options.target
    if target is None or target in backend.targets:
        return
    if not backend.targets:
        raise SpecError(f"the {backend.name} runtime has no targets, and target={target!r} was given. Leave it out.")
    raise SpecError(f"unknown {backend.name} target {target!r}. {nearest(target, (*backend.targets, *known_names()))}")


def _check_build(backend: Backend, options: ExportOptions) -> None:
    if options.portable:
        _check_portable(backend, options)
    if options.build == DEFAULT_BUILD:
        return
    if backend.options is None:
        raise SpecError(f"{options.build} was given, and builds for {backend.name} take no such options. Leave it out.")
    resolve(backend.options)(options.build, options.target)


def _check_portable(backend: Backend, options: ExportOptions) -> None:
    if backend.portable is None:
        having = [name for name in engine_names() if load_backend(name).portable is not None]
        raise SpecError(
            f"portable=True was given, and {backend.name} has no portable form; {', '.join(having)} has one. "
            "Leave it out."
        )
    if options.target is not None:
        raise SpecError(
            f"portable=True and target={options.target!r} were both given; a portable engine is finished on the "
            "device that opens it, whichever it is. Leave one out."
        )
    if options.build != DEFAULT_BUILD:
        raise SpecError(
            f"portable=True and {options.build} were both given; the device that opens a portable engine builds it "
            "for itself. Leave one out."
        )


def _check_fp32(backend: Backend, options: ExportOptions) -> None:
    """Refuse what is measured beside FP32, where the device has none."""
    mixed = isinstance(options.precision, Int8) and options.precision.mixed_precision
    asked = {"mixed_precision": mixed, "require_speedup": options.require_speedup}
    given = [name for name, is_asked in asked.items() if is_asked]
    if given and Fp32.name not in backend.precisions:
        raise SpecError(
            f"{given[0]} was given, which measures beside fp32, and {backend.title} has "
            f"{', '.join(backend.precisions)}. Leave it out."
        )


def _check_precision(backend: Backend, job: ExportJob) -> None:
    precision, spec = job.options.precision, job.backbone.spec
    if precision.name not in backend.precisions:
        raise SpecError(f"the {backend.title} runtime has no {precision.name}; it has {', '.join(backend.precisions)}.")
    _check_fp32(backend, job.options)
    if isinstance(precision, Int8):
        if precision.float_dtype not in backend.int8_float_dtypes:
            raise SpecError(
                f"the {backend.title} runtime has no int8 with {precision.float_dtype} beside it; it has "
                f"{', '.join(backend.int8_float_dtypes)}. Leave float_dtype out."
            )
        with_recipe(precision, job.backbone.family)
    if precision.min_top1_agreement is not None and (spec.features_only or spec.num_classes == 0):
        raise SpecError(
            f"min_top1_agreement needs logits, and this engine gives {', '.join(spec.output_names)}. "
            "Leave it out for features and embeddings."
        )
