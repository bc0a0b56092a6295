"""What a convolutional family is held to: timm's numbers, and graphs that carry only the network's math."""

import warnings
from collections import Counter

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.optional import require
from tests.backbones.realistic import randomize, settle

CONVOLUTIONAL_OPS = {
    "Conv", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Add", "ReduceMean", "Reshape", "Gemm",
    "MaxPool", "AveragePool", "Pad",
}  # fmt: skip


def variants(table, *, fast):
    """Every name of a variants table; those outside ``fast`` are marked slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in table]


def assert_equals_timm(timm, backbone, name):
    """Strict load of timm's state dict; logits, features and levels as timm's at two sizes."""
    reference = randomize(timm.create_model(name)).eval()
    weights = reference.state_dict()
    classifier = _load(backbone, name, weights)
    pyramid = _load(backbone, name, weights, features_only=True)
    features = timm_features(timm, name, weights)
    assert pyramid.feature_info.channels() == features.feature_info.channels()
    assert pyramid.feature_info.reduction() == features.feature_info.reduction()
    assert [level.index for level in pyramid.feature_info] == [0, 1, 2, 3, 4]
    native = classifier.spec.image_size
    with torch.no_grad():
        for height, width in (native, (96, 160)):
            images = torch.randn(1, 3, height, width)
            assert_close(classifier(images), reference(images))
            for level, ours, theirs in zip(
                pyramid.feature_info, pyramid(images).values(), features(images), strict=True
            ):
                assert_close(ours, theirs)
                assert ours.shape[1:] == (level.channels, -(-height // level.stride), -(-width // level.stride))


def assert_dilates_as_timm(timm, backbone, name, output_stride):
    """Features at ``output_stride`` equal timm's, levels too."""
    weights = randomize(timm.create_model(name)).state_dict()
    ours = _load(backbone, name, weights, features_only=True, output_stride=output_stride)
    theirs = timm_features(timm, name, weights, output_stride=output_stride)
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        for feature, expected in zip(ours(images).values(), theirs(images), strict=True):
            assert_close(feature, expected)


def assert_embedding_is_timms(timm, backbone, name):
    """With ``num_classes=0`` a call gives timm's pooled embedding."""
    reference = randomize(timm.create_model(name)).eval()
    kept = timm.create_model(name, num_classes=0).state_dict().keys()
    weights = {key: value for key, value in reference.state_dict().items() if key in kept}
    ours = _load(backbone, name, weights, num_classes=0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(images), pre_logits=True)
        assert_close(ours(images), expected)


def assert_sources_are_timms(timm, backbone):
    """Tag, preprocessing and image size of every variant are those of timm's default weights."""
    for name, variant in backbone.variants.items():
        expected, source = timm.get_pretrained_cfg(name), variant.pretrained
        if source is None:
            assert expected.hf_hub_id is None, name
            continue
        assert expected.hf_hub_id == f"timm/{name}.{source.tag}"
        for field in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
            assert getattr(source.preprocessing, field) == getattr(expected, field), (name, field)
        assert source.image_size == expected.input_size[1:], name
        assert source.num_classes == expected.num_classes, name


def assert_gradients_survive_checkpointing(backbone, name):
    """The same gradients with and without recomputing."""
    torch.manual_seed(0)
    model = randomize(backbone(name, BackboneOptions(num_classes=10))).train()
    images = torch.randn(2, 3, 64, 64)
    deepest = list(model.stage_modules().values())[-1][-1]
    runs = []
    next(module for module in deepest.modules() if isinstance(module, torch.nn.Conv2d)).register_forward_hook(
        lambda *_: runs.append(model.grad_checkpointing)
    )
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)
    assert runs == [False, True, True]


def measured_receptive_field(model, level, side):
    """The side in pixels of the square of inputs on which a value in the middle of the map depends."""
    seen = torch.zeros(side, side)
    for seed in range(2):
        torch.manual_seed(seed)
        images = torch.randn(1, 3, side, side, requires_grad=True)
        maps, _ = model.forward_levels(images, level + 1)
        middle = maps[level].shape[-1] // 2
        maps[level][0, :, middle, middle].sum().backward()
        seen += images.grad.abs().sum((0, 1))
    rows = torch.nonzero(seen.sum(1)).flatten()
    columns = torch.nonzero(seen.sum(0)).flatten()
    height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
    assert height == width
    return height


class Everything(torch.nn.Module):
    """A backbone's levels and head output in one call, to export one graph for both."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return list(self.model.forward_everything(images).values())


def assert_exports(backbone, name, path, side=64, also=(), **options):
    """From a batch-1 example with a dynamic batch to ONNX Runtime and OpenVINO: at least 90 dB at batch 1 and 4.

    The graph has convolutional operators, and those of ``also``, alone.
    """
    model = Everything(randomize(backbone(name, BackboneOptions(**options))))
    model = settle(model, torch.randn(12, 3, side, side)).eval()
    with warnings.catch_warnings():
        # torch.onnx warns through its own dependencies.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.randn(1, 3, side, side),),
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    program.save(str(path))
    ops = Counter(node.op_type for node in program.model_proto.graph.node)
    assert set(ops) <= CONVOLUTIONAL_OPS | set(also), ops
    session = require("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compiled = require("openvino").Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 4):
        images = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            expected = model(images)
        in_onnxruntime = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        in_openvino = list(compiled([images.numpy()]).values())
        for outputs in (in_onnxruntime, in_openvino):
            for ours, theirs in zip(outputs, expected, strict=True):
                assert sqnr_db(torch.from_numpy(ours), theirs) >= 90


def sqnr_db(noisy, clean):
    """The signal's power over the error's, in dB."""
    error = (noisy - clean).double().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(clean.double().square().sum() / error))


def assert_close(ours, theirs):
    """Within 1e-4 relative, in L2."""
    assert ours.shape == theirs.shape
    error = float((ours - theirs).norm() / theirs.norm())
    assert error <= 1e-4, f"relative error {error:.1e}"


def timm_features(timm, name, weights, **options):
    """timm's features_only model with these weights; those of the head are left over."""
    model = timm.create_model(name, features_only=True, **options)
    # timm flattens the modules of some families: stages.0 becomes stages_0.
    by_flat_name = {key.replace(".", "_"): value for key, value in weights.items()}
    model.load_state_dict({key: by_flat_name[key.replace(".", "_")] for key in model.state_dict()}, strict=True)
    return model.eval()


def _load(backbone, name, weights, **options):
    model = backbone(name, BackboneOptions(**options)).eval()
    model.load_state_dict(weights, strict=True)
    return model
