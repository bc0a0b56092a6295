"""Vision backbones, compiled and quantized for the edge, with the numbers that prove nothing broke.

The public names below are resolved when first used: importing deploykit imports neither torch nor
a runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deploykit.privacy import silence_runtimes

if TYPE_CHECKING:
    from deploykit.accuracy.evaluation import Evaluation, evaluate
    from deploykit.assertion import assert_parity
    from deploykit.backbones.activation_compression import compressed_activations
    from deploykit.backbones.base import BaseBackbone
    from deploykit.backbones.feature_cache import FeatureCache
    from deploykit.backbones.memory_efficient import memory_efficient
    from deploykit.backbones.necks import FeaturePyramid, FeatureSelector, PathAggregation, WithNeck, build_fpn
    from deploykit.backbones.registry import backbone_names, register_backbone
    from deploykit.calibration.images import CalibrationSet
    from deploykit.changes.comparison import BundleComparison, compare_bundles
    from deploykit.changes.tolerances import Tolerances
    from deploykit.errors import (
        BundleError,
        CalibrationError,
        DeployKitError,
        DeviceUnavailable,
        ExportError,
        FusionError,
        ImageError,
        IncompatibleEngine,
        MissingDependency,
        ParityError,
        SpecError,
        TransferError,
        WeightsError,
    )
    from deploykit.export.import_quantized import import_quantized
    from deploykit.facade import create_backbone, export_backbone
    from deploykit.feature_dict import Features
    from deploykit.images.preprocess import load_images, preprocess
    from deploykit.loading import load_bundle
    from deploykit.predict import Prediction
    from deploykit.qat import prepare_qat
    from deploykit.serving.repository import ServedModel, write_repository
    from deploykit.shipping.transfer import Transfer, pull_bundle, push_bundle
    from deploykit.signatures import sign_bundle
    from deploykit.spec import (
        BackboneSpec,
        BatchRange,
        Bf16,
        BuildOptions,
        FeatureLevel,
        Fp16,
        Fp32,
        InputSpec,
        Int8,
        Preprocessing,
        SizeRange,
        TensorSpec,
    )
    from deploykit.verification import verify_bundle

__version__ = "0.1.0"

silence_runtimes()

_PUBLIC = {
    "create_backbone": "facade",
    "load_bundle": "loading",
    "sign_bundle": "signatures",
    "write_repository": "serving.repository",
    "ServedModel": "serving.repository",
    "push_bundle": "shipping.transfer",
    "pull_bundle": "shipping.transfer",
    "Transfer": "shipping.transfer",
    "export_backbone": "facade",
    "export_targets": "several_targets",
    "verify_bundle": "verification",
    "import_quantized": "export.import_quantized",
    "prepare_qat": "qat",
    "evaluate": "accuracy.evaluation",
    "Evaluation": "accuracy.evaluation",
    "assert_parity": "assertion",
    "compare_bundles": "changes.comparison",
    "BundleComparison": "changes.comparison",
    "Tolerances": "changes.tolerances",
    "BaseBackbone": "backbones.base",
    "register_backbone": "backbones.registry",
    "backbone_names": "backbones.registry",
    "FeatureSelector": "backbones.necks",
    "FeaturePyramid": "backbones.necks",
    "PathAggregation": "backbones.necks",
    "WithNeck": "backbones.necks",
    "build_fpn": "backbones.necks",
    "FeatureCache": "backbones.feature_cache",
    "Features": "feature_dict",
    "compressed_activations": "backbones.activation_compression",
    "memory_efficient": "backbones.memory_efficient",
    "CalibrationSet": "calibration.images",
    "load_images": "images.preprocess",
    "preprocess": "images.preprocess",
    "Prediction": "predict",
    "BackboneSpec": "spec",
    "BatchRange": "spec",
    "FeatureLevel": "spec",
    "InputSpec": "spec",
    "Preprocessing": "spec",
    "SizeRange": "spec",
    "TensorSpec": "spec",
    "Fp32": "spec",
    "Fp16": "spec",
    "Bf16": "spec",
    "BuildOptions": "spec",
    "Int8": "spec",
    "DeployKitError": "errors",
    "SpecError": "errors",
    "WeightsError": "errors",
    "MissingDependency": "errors",
    "FusionError": "errors",
    "ImageError": "errors",
    "CalibrationError": "errors",
    "ExportError": "errors",
    "BundleError": "errors",
    "IncompatibleEngine": "errors",
    "DeviceUnavailable": "errors",
    "ParityError": "errors",
    "TransferError": "errors",
}

__all__ = [
    "BackboneSpec",
    "BaseBackbone",
    "BatchRange",
    "Bf16",
    "BuildOptions",
    "BundleComparison",
    "BundleError",
    "CalibrationError",
    "CalibrationSet",
    "DeployKitError",
    "DeviceUnavailable",
    "Evaluation",
    "ExportError",
    "FeatureCache",
    "FeatureLevel",
    "FeaturePyramid",
    "FeatureSelector",
    "Features",
    "Fp16",
    "Fp32",
    "FusionError",
    "ImageError",
    "IncompatibleEngine",
    "InputSpec",
    "Int8",
    "MissingDependency",
    "ParityError",
    "PathAggregation",
    "Prediction",
    "Preprocessing",
    "ServedModel",
    "SizeRange",
    "SpecError",
    "TensorSpec",
    "Tolerances",
    "Transfer",
    "TransferError",
    "WeightsError",
    "WithNeck",
    "__version__",
    "assert_parity",
    "backbone_names",
    "build_fpn",
    "compare_bundles",
    "compressed_activations",
    "create_backbone",
    "evaluate",
    "export_backbone",
    "export_targets",
    "import_quantized",
    "load_bundle",
    "load_images",
    "memory_efficient",
    "prepare_qat",
    "preprocess",
    "pull_bundle",
    "push_bundle",
    "register_backbone",
    "sign_bundle",
    "verify_bundle",
    "write_repository",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'deploykit' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"deploykit.{_PUBLIC[name]}"), name)
    except ModuleNotFoundError as error:
        from deploykit.optional import PACKAGES

        package = PACKAGES.get(error.name or "")
        if package is None:
            raise
        raise package.missing() from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
