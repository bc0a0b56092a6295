"""Models of other quantizers: their numbers, scales and integers, and what cannot be taken."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType

import deploykit
from deploykit.backends.backend import resolve
from deploykit.backends.table import load_backend
from deploykit.calibration.ranges import ActivationRange
from deploykit.errors import QuantizedModelError, SaturationWarning, SpecError
from deploykit.export.import_quantized import _rename_outputs, import_quantized
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db
from tests.export.quantized_models import CLASSES, SIDE, images, network, quantize_static, with_channel_scales

pytestmark = pytest.mark.filterwarnings("ignore:products of 8-bit weights saturate")  # on some processors

FORMS = {
    "uint8": {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8},
    "int8": {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8},
    "symmetric": {
        "per_channel": True,
        "activation_type": QuantType.QInt8,
        "weight_type": QuantType.QInt8,
        "extra_options": {"ActivationSymmetric": True, "DedicatedQDQPair": True},
    },
    "scalar uint8 weights": {
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QUInt8,
        "extra_options": {"WeightSymmetric": True},
    },
}


def changed(path, change):
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path


def without_zero_points(model):
    """Let activations' pairs name no zero point, as ModelOpt writes them: output_dtype says that they are int8."""
    writers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        pair = node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in writers)
        if pair:
            del node.input[2:]
            if node.op_type == "QuantizeLinear":
                node.attribute.append(helper.make_attribute("output_dtype", TensorProto.INT8))


def as_opset_10(model):
    """The same scales by tensor in the first opset that has quantizers; a Clip has its bounds in attributes there."""
    model.opset_import[0].version = 10
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            del node.attribute[:]


@pytest.fixture(scope="module", params=[*FORMS, "channels", "relu", "opset 13", "opset 10", "output_dtype"])
def source(request, tmp_path_factory):
    folder, name = tmp_path_factory.mktemp("quantized"), request.param
    opset = int(name.split()[1]) if name.startswith("opset") else 21
    if name == "opset 10":
        path = quantize_static(folder, network("Relu", opset=13), **FORMS["uint8"] | {"per_channel": False})
        return changed(path, as_opset_10)
    path = quantize_static(
        folder, network("Relu" if name == "relu" else "Clip", opset=opset), **FORMS.get(name, FORMS["uint8"])
    )
    if name == "output_dtype":
        path = quantize_static(folder, network(), **FORMS["symmetric"])
        changed(path, without_zero_points)
    return with_channel_scales(path, "expand") if name == "channels" else path


@pytest.fixture(scope="module")
def imported(source):
    return import_quantized(source)


def rendered(network, runtime):
    """What a runtime's dialect makes of the plan, node by node."""
    dialect = resolve(load_backend(runtime).dialect)
    graph = dialect.render(network.master, dialect.keep_float(network.master.model, network.plan), images()).graph
    session = onnx_session(graph.model, optimize=False)
    return np.concatenate([session.run(["logits"], {"images": image[None]})[0] for image in images()])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_dialect_gives_the_models_own_numbers(imported, runtime):
    want = imported.outputs_of_source(images())["logits"]
    assert want.shape == (8, CLASSES)
    assert sqnr_db(want, rendered(imported, runtime)) > 35
    assert len(imported.plan.placement.weights) == 7
    assert imported.plan.placement.float_nodes == {}


def test_integers_and_scales_are_those_of_the_file(source, imported):
    model = onnx.load(source)
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    writers = {output: node for node in model.graph.node for output in node.output}
    master = imported.master.model
    for name, use in imported.plan.placement.weights.items():
        dequantize = writers[nodes[name.partition("/")[0]].input[1]]
        theirs = arrays[dequantize.input[0]].astype(np.int16)
        theirs -= 128 if arrays[dequantize.input[0]].dtype == np.uint8 else 0
        values = master.graph.initializers[use.weight].const_value.numpy()
        integers, scales = imported.plan.integers_of(name, values, use.axis)
        np.testing.assert_array_equal(integers, theirs)
        if "channel_scale" not in arrays:
            np.testing.assert_allclose(scales, np.broadcast_to(arrays[dequantize.input[1]], scales.shape), rtol=1e-6)
    scale, zero = next(
        (arrays[node.input[1]], arrays[node.input[2]] if len(node.input) > 2 else np.int8(0))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] == "images"
    )
    shift = 128 if zero.dtype == np.int8 else 0
    assert imported.plan.range_of("images").affine() == (pytest.approx(float(scale), rel=1e-6), int(zero) + shift)


def test_bundles_of_two_runtimes_give_the_models_numbers(tmp_path):
    path = quantize_static(tmp_path, network(), **FORMS["uint8"])
    found = import_quantized(path, labels=[f"class {index}" for index in range(CLASSES)])
    want = found.outputs_of_source(images())["logits"]
    for runtime in ("onnxruntime", "openvino"):
        result = found.export(tmp_path / runtime, runtime=runtime, images=images(), min_sqnr_db=12)
        assert result.status == "parity_checked"
        assert result.parity.reference == "the model that was imported"
        with deploykit.load_bundle(tmp_path / runtime) as engine:
            own = np.concatenate([engine(image[None]) for image in images()])
            assert engine.labels == tuple(f"class {index}" for index in range(CLASSES))
        assert sqnr_db(want, own) > 12  # less than node by node where weights are rounded anew
        assert deploykit.verify_bundle(tmp_path / runtime).passed


def test_weights_are_rounded_anew_where_products_would_saturate(tmp_path):
    path = quantize_static(tmp_path, network(), **FORMS["uint8"])
    found = import_quantized(path)
    with pytest.warns(UserWarning, match="rounded anew"):
        result = found.export(tmp_path / "old", runtime="onnxruntime", images=images(), target="x86-avx2")
    assert result.manifest.precision_settings["reduce_range"] is True
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rounded anew")
        warnings.filterwarnings("ignore", category=SaturationWarning)
        kept = found.export(tmp_path / "new", runtime="onnxruntime", images=images(), target="x86-vnni", min_sqnr_db=0)
    assert kept.manifest.precision_settings["reduce_range"] is False


def test_the_range_of_a_quantizer_gives_its_integers_back():
    from deploykit.calibration.imported_plan import quantizer_range
    from deploykit.calibration.strip_quantizers import TensorQuantizer

    for zero in (0, 3, 128, 255):
        scale = float(np.float32(0.0371))
        assert quantizer_range(TensorQuantizer(scale=scale, zero_point=zero)).affine() == (pytest.approx(scale), zero)
    assert quantizer_range(TensorQuantizer(scale=0.5, zero_point=128)).symmetric() == 0.5
    assert isinstance(quantizer_range(TensorQuantizer(scale=0.5, zero_point=0)), ActivationRange)


def test_a_clip_that_the_integers_made_needless_is_back_in_float(tmp_path):
    """ONNX Runtime's quantizer removes a ReLU whose bounds are those of the integers behind it."""
    path = quantize_static(tmp_path, network("Relu", opset=13), **FORMS["uint8"] | {"per_channel": False})
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "Relu"]
    for source in (path, changed(path, as_opset_10)):
        found = import_quantized(source)
        assert sum(node.op_type == "Clip" for node in found.master.model.graph) == 4


def test_quantizers_of_16_bits_without_a_zero_point_are_named(tmp_path):
    def to_int16(model):
        without_zero_points(model)
        for node in model.graph.node:
            for attribute in node.attribute:
                attribute.i = TensorProto.INT16 if attribute.name == "output_dtype" else attribute.i

    path = quantize_static(tmp_path, network(), **FORMS["symmetric"])
    with pytest.raises(QuantizedModelError, match="INT16"):
        import_quantized(changed(path, to_int16))


def test_what_cannot_be_taken_is_named(tmp_path):
    with pytest.raises(QuantizedModelError, match="integer operators: stem_quant"):
        import_quantized(quantize_static(tmp_path, network(), quant_format=QuantFormat.QOperator))
    with pytest.raises(QuantizedModelError, match="UINT16"):
        import_quantized(quantize_static(tmp_path, network(), activation_type=QuantType.QUInt16))
    with pytest.raises(QuantizedModelError, match=r"stem\S*: its weight has zero points"):
        import_quantized(
            quantize_static(tmp_path, network(), weight_type=QuantType.QUInt8, activation_type=QuantType.QUInt8)
        )
    with pytest.raises(QuantizedModelError, match="no convolution or matrix product"):
        path = tmp_path / "float.onnx"
        onnx.save(network(), path)
        import_quantized(path)
    with pytest.raises(QuantizedModelError, match="cannot be read as ONNX"):
        import_quantized(tmp_path / "nowhere.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(QuantizedModelError, match=r"junk\.onnx"):
        import_quantized(tmp_path / "junk.onnx")


def test_channel_scales_elsewhere_are_named(tmp_path):
    path = quantize_static(tmp_path, network(), **FORMS["uint8"])
    with_channel_scales(path, "depthwise")  # which a plain convolution reads
    with pytest.raises(QuantizedModelError, match=r"depthwise one: depthwise"):
        import_quantized(path)


def test_graphs_of_other_shapes_are_named(tmp_path):
    path = quantize_static(tmp_path, network(), **FORMS["uint8"])

    def second_input(model):
        model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1, 3]))

    def foreign(model):
        model.opset_import.append(helper.make_opsetid("my.domain", 1))
        model.graph.node[-1].domain = "my.domain"

    for change, message in ((second_input, "expected one input"), (foreign, r"my\.domain")):
        kept = path.read_bytes()
        with pytest.raises(QuantizedModelError, match=message):
            import_quantized(changed(path, change))
        path.write_bytes(kept)
    with pytest.raises(SpecError, match="6 labels"):
        import_quantized(path, labels=list("abcdef"))
    with pytest.raises(SpecError, match="takes no ONNX graphs"):
        import_quantized(path).export(tmp_path / "bundle", runtime="torch_compile")
    assert not (tmp_path / "bundle").exists()


def test_the_command_writes_a_bundle(tmp_path):
    from tests.cli.conftest import call

    path = quantize_static(tmp_path, network(), **FORMS["uint8"])
    np.save(tmp_path / "images.npy", images())
    words = ("--runtime", "onnxruntime", "--images", tmp_path / "images.npy", "-o", tmp_path / "bundle")
    done = call("import", path, *words, "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
    assert done.code == 0, done.err
    assert "7 layers in integers, 0 in float." in done.out
    assert "against the model that was imported" in " ".join(done.out.split())
    with deploykit.load_bundle(tmp_path / "bundle") as engine:
        assert engine.input_spec.preprocessing.mean == (0.5, 0.5, 0.5)
        assert engine.input_spec.height == SIDE
    refused = call("import", tmp_path / "images.npy", "--runtime", "onnxruntime")
    assert (refused.code, "cannot be read as ONNX" in refused.err) == (6, True)


@pytest.mark.slow
def test_nncfs_own_graph_gives_its_own_numbers(tmp_path):
    nncf = pytest.importorskip("nncf", reason="nncf is not installed")
    dataset = nncf.Dataset(list(images()), lambda image: {"images": image[None]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = nncf.quantize(network(), dataset, subset_size=8, preset=nncf.QuantizationPreset.MIXED)
    onnx.save(quantized, tmp_path / "nncf.onnx")
    found = import_quantized(tmp_path / "nncf.onnx")
    want = found.outputs_of_source(images())["logits"]
    assert len(found.plan.placement.weights) == 7
    for runtime in ("onnxruntime", "openvino"):
        assert sqnr_db(want, rendered(found, runtime)) > 35


@pytest.mark.slow
def test_a_model_of_the_pt2e_flow_gives_its_own_numbers(tmp_path):
    quantize = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
    inductor = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    import torch
    from torch import nn

    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU()]
    module = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)).eval()
    example = (torch.from_numpy(images(1)),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = inductor.get_default_x86_inductor_quantization_config()
        quantizer = inductor.X86InductorQuantizer().set_global(config)
        prepared = quantize.prepare_pt2e(torch.export.export(module, example).module(), quantizer)
        for image in images():
            prepared(torch.from_numpy(image[None]))
        converted = quantize.convert_pt2e(prepared)
        torch.onnx.export(converted, example, tmp_path / "pt2e.onnx", dynamo=True, verbose=False)
    found = import_quantized(tmp_path / "pt2e.onnx")
    want = found.outputs_of_source(images())["logits"]
    assert len(found.plan.placement.weights) == 3
    for runtime in ("onnxruntime", "openvino"):
        dialect = resolve(load_backend(runtime).dialect)
        graph = dialect.render(found.master, found.plan, images()).graph
        session = onnx_session(graph.model, optimize=False)
        name = found.input.name
        own = np.concatenate([session.run(["logits"], {name: image[None]})[0] for image in images()])
        assert sqnr_db(want, own) > 35


@pytest.mark.parametrize("names", [("stage1", "stage2"), ("b", "a"), ("input", "weight"), ("a", "b")])
def test_outputs_may_take_each_others_names(names):
    images, weight = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("input", "weight"))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("a", "b")]
    nodes = [helper.make_node("Relu", ["input"], ["a"]), helper.make_node("Add", ["a", "weight"], ["b"])]
    model = ir.from_proto(helper.make_model(helper.make_graph(nodes, "graph", [images, weight], outputs)))
    _rename_outputs(model, names)
    onnx.checker.check_model(ir.to_proto(model))
    assert tuple(output.name for output in model.graph.outputs) == names
    values = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    assert len(set(values)) == 4
