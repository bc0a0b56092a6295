"""What a family with attention is held to: timm's numbers at a size given at construction, and clean graphs."""

import copy
import warnings
from collections import Counter
from dataclasses import replace

import torch

from deploykit.backbones.attention import onnx_translations
from deploykit.backbones.base import BackboneOptions
from deploykit.fusion.program import export_program
from deploykit.optional import require
from deploykit.spec import BatchRange
from tests.backbones.against_timm import Everything, assert_close, sqnr_db
from tests.backbones.realistic import randomize


def build(backbone, name, weights=None, **options):
    """A backbone in eval mode, with random realistic weights where none are given."""
    model = backbone(name, BackboneOptions(**options)).eval()
    if weights is None:
        torch.manual_seed(0)
        randomize(model)
        return model.eval()
    model.load_state_dict(weights, strict=True)
    return model


def assert_equals_timm(timm, backbone, name, size=None, **built):
    """Strict load; logits, embedding, features and levels as timm's, built with ``built``; ``size`` None: native."""
    if size is not None and backbone.fixed_size:
        built["img_size"] = size
    reference = randomize(timm.create_model(name, num_classes=10, **built)).eval()
    weights = reference.state_dict()
    classifier = build(backbone, name, weights, num_classes=10, image_size=size)
    pyramid = build(backbone, name, weights, num_classes=10, image_size=size, features_only=True)
    trunk = {key: value for key, value in weights.items() if not key.startswith("head.")}
    embedder = build(backbone, name, trunk, num_classes=0, image_size=size)
    features = _timm_features(timm, name, weights, built)
    assert pyramid.feature_info.channels() == features.feature_info.channels()
    assert pyramid.feature_info.reduction() == features.feature_info.reduction()
    images = torch.randn(2, 3, *classifier.spec.image_size)
    with torch.no_grad():
        assert_close(classifier(images), reference(images))
        assert_close(embedder(images), reference.forward_head(reference.forward_features(images), pre_logits=True))
        for ours, theirs in zip(pyramid(images).values(), features(images), strict=True):
            assert_close(ours, theirs)


def assert_gradients_survive_checkpointing(backbone, name, **options):
    """The same gradients with and without recomputing, which does take place."""
    model = build(backbone, name, **options).train()
    images = torch.randn(2, 3, *model.spec.image_size)
    runs = []
    deepest = list(model.stage_modules().values())[-1][0]
    layers = [module for module in deepest.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    layers[0].register_forward_hook(lambda *_: runs.append(model.grad_checkpointing))
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)
    assert runs == [False, True, True]


def exported(model, path, *, everything=True):
    """The ONNX file of a model with a dynamic batch; returns the count of each operator."""
    spec = replace(model.input_spec, batch=BatchRange(max=8))
    module = copy.deepcopy(model).eval().requires_grad_(False)
    program = export_program(Everything(module) if everything else module, spec)
    with warnings.catch_warnings():
        # torch.onnx warns through its own dependencies.
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=21, custom_translation_table=onnx_translations(), verbose=False
        )
    onnx_program.save(str(path))
    return Counter(node.op_type for node in onnx_program.model.graph)


def assert_exports(model, path, ops):
    """Only ``ops`` in the graph; at least 90 dB in ONNX Runtime and OpenVINO at batch 1 and 4, every output."""
    found = exported(model, path)
    assert set(found) <= ops, found
    session = require("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compiled = require("openvino").Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 4):
        images = torch.randn(batch, 3, *model.spec.image_size)
        with torch.no_grad():
            expected = list(model.forward_everything(images).values())
        in_onnxruntime = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        in_openvino = [compiled([images.numpy()])[output] for output in compiled.outputs]
        for outputs in (in_onnxruntime, in_openvino):
            for ours, theirs in zip(outputs, expected, strict=True):
                assert sqnr_db(torch.from_numpy(ours), theirs) >= 90


def _timm_features(timm, name, weights, built):
    """timm's features_only model with these weights: a plain ViT's holds the whole model under ``model.``."""
    model = timm.create_model(name, features_only=True, **built).eval()
    named = {f"model.{key}": value for key, value in weights.items()} | weights
    flat = {key.replace(".", "_"): value for key, value in named.items()}
    model.load_state_dict({key: flat[key.replace(".", "_")] for key in model.state_dict()}, strict=True)
    return model
