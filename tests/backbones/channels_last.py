"""What ConvNeXt and Swin are held to: timm's numbers at several sizes, and graphs of the network's math alone."""

import warnings
from collections import Counter

import torch

from deploykit.backbones.attention import onnx_translations
from deploykit.backbones.base import BackboneOptions
from deploykit.optional import require
from tests.backbones.against_timm import assert_close, timm_features
from tests.backbones.realistic import randomize

GRAPH_OPS = {
    "Conv", "MatMul", "Gemm", "Add", "Mul", "Gelu", "LayerNormalization", "ReduceMean", "Transpose", "Reshape",
}  # fmt: skip


@torch.no_grad()
def realistic(model, seed=0):
    """As `randomize`, with the position biases and cosine factors of a trained Swin."""
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.normal_(generator=generator)
        elif name.endswith("logit_scale"):
            parameter.uniform_(1, 4, generator=generator)
        elif "cpb_mlp" in name:
            parameter.normal_(0, 0.2, generator=generator)
    return model


def assert_equals_timm(timm, backbone, name, size, *, sized=False, output_stride=32, reference_name=None, **shape):
    """Strict load of timm's state dict; logits, features and levels as timm's.

    ``sized``: timm is built for a size and gives channels-last maps. ``shape``: timm's words for a
    variant that it lacks, over its ``reference_name``.
    """
    reference_name = reference_name or name
    options = {"img_size": size, **shape} if sized else {"output_stride": output_stride, **shape}
    reference = realistic(timm.create_model(reference_name, **options)).eval()
    weights = reference.state_dict()
    ours = load(backbone, name, weights, image_size=size, output_stride=output_stride)
    features = timm_features(timm, reference_name, weights, **options)
    assert ours.feature_info.channels() == features.feature_info.channels()
    assert ours.feature_info.reduction() == features.feature_info.reduction()
    assert [(level.name, level.index) for level in ours.feature_info] == [(f"stage{i}", i) for i in (1, 2, 3, 4)]
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        outputs = ours.forward_everything(images)
        assert_close(outputs.pop("logits"), reference(images))
        for (level, ours_map), theirs in zip(outputs.items(), features(images), strict=True):
            assert_close(ours_map, theirs.permute(0, 3, 1, 2) if sized else theirs)
            assert ours_map.shape[1] == {info.name: info.channels for info in ours.feature_info}[level]


def assert_exports(model, path, *, also=()):
    """From a batch-1 example with a dynamic batch to both runtimes: the graph's operators, 90 dB at batch 1 and 4."""
    names = [level.name for level in model.all_levels]
    wrapped = _Everything(model, names)
    channels, height, width = model.input_spec.shape[1:]
    with warnings.catch_warnings():
        # torch.onnx warns through its own dependencies.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            wrapped.eval(),
            (torch.randn(1, channels, height, width),),
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=21,
            custom_translation_table=onnx_translations(),
            verbose=False,
        )
    program.save(str(path))
    found = Counter(node.op_type for node in program.model_proto.graph.node)
    assert set(found) <= GRAPH_OPS | set(also), found
    session = require("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compiled = require("openvino").Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 4):
        images = torch.randn(batch, channels, height, width)
        with torch.no_grad():
            expected = wrapped(images)
        in_onnxruntime = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        in_openvino = list(compiled([images.numpy()]).values())
        for outputs in (in_onnxruntime, in_openvino):
            for ours, theirs in zip(outputs, expected, strict=True):
                assert sqnr_db(torch.from_numpy(ours), theirs) >= 90
    return found


def assert_gradients_survive_checkpointing(model, images):
    """The same gradients with and without recomputing, and blocks that do run again."""
    runs = []
    model.stage_modules()["stage4"][-1].blocks[-1].register_forward_pre_hook(lambda *_: runs.append(1))
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-5, atol=1e-6)
    assert len(runs) == 3


def load(backbone, name, weights, **options):
    """A backbone in eval mode with these weights."""
    model = backbone(name, BackboneOptions(**options)).eval()
    model.load_state_dict(weights, strict=True)
    return model


def sqnr_db(noisy, clean):
    """The signal's power over the error's, in dB."""
    error = (noisy - clean).double().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(clean.double().square().sum() / error))


class _Everything(torch.nn.Module):
    """Levels and head output of one run, to export one graph for both."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, images):
        maps, trunk = self.model.forward_levels(images, len(self.names))
        return [*maps, self.model.forward_head(trunk)]
