"""One engine for a range of image sizes: its corners are proved, others run, and what is outside is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import deploykit
from deploykit.bench import bench
from deploykit.errors import ParityError, SpecError
from deploykit.images.preprocess import normalize
from deploykit.manifest import decode_manifest
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.reference import corner_file
from deploykit.spec import InputSpec, SizeRange, parse_image_sizes
from deploykit.verification import verify_bundle
from tests.any_size import AnySize

SIZES = (16, (24, 32), (40, 64))
CORNERS = [(16, 16), (40, 64), (16, 64)]
RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def backbone():
    return AnySize()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, backbone):
    folder = tmp_path_factory.mktemp("sizes")
    images = np.random.default_rng(0).normal(size=(16, 3, 24, 32)).astype(np.float32)
    for runtime in RUNTIMES:
        deploykit.export_backbone(
            backbone, folder / runtime, runtime=runtime, image_size=SIZES, precision="int8",
            calibration=images,
        )  # fmt: skip
    deploykit.export_backbone(
        AnySize(features_only=True), folder / "pixels", runtime=RUNTIMES[0], image_size=SIZES, batch_size=(1, 2, 4),
        embed_preprocessing=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=RUNTIMES)
def bundle(request, bundles):
    return bundles / request.param


def test_a_range_has_corners_steps_and_a_nearest_size():
    sizes = SizeRange(min=64, opt=(96, 128), max=(128, 256), step=32)
    assert sizes.corners == ((64, 64), (96, 128), (128, 256), (64, 256))
    assert sizes.accepts((96, 160))
    assert not sizes.accepts((96, 161)) and not sizes.accepts((160, 160)) and not sizes.accepts(("height", "width"))
    assert sizes.nearest((100, 999)) == (96, 256)
    assert sizes.nearest((1, 1)) == (64, 64)
    assert str(sizes) == "64x64 to 128x256, best 96x128, in steps of 32"
    assert parse_image_sizes((64, 96, 128)) == SizeRange(min=64, opt=96, max=128)
    assert parse_image_sizes((64, 96)) == (64, 96) and parse_image_sizes(64) == (64, 64)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"min": 64, "opt": 32, "max": 128}, "min <= opt <= max"),
        ({"min": 64, "opt": (96, 32), "max": 128}, "min <= opt <= max"),
        ({"min": 0, "opt": 32, "max": 128}, "image_size is 0"),
        ({"min": 32, "opt": 64.5, "max": 128}, "image_size is 64.5"),
        ({"min": 30, "opt": 64, "max": 100, "step": 32}, "30x30, 100x100.*multiples of 32.*32x32, 96x96"),
        ({"min": 32, "opt": 64, "max": 128, "step": 0}, "step is 0"),
    ],
)
def test_a_range_that_cannot_be_is_refused(given, said):
    with pytest.raises(SpecError, match=said):
        SizeRange(**given)


@pytest.mark.parametrize("given", ["big", (1, 2, 3, 4), (64, "96", 128), {"min": 3}, True])
def test_no_size_is_refused(given):
    with pytest.raises(SpecError, match="image_size is"):
        parse_image_sizes(given)


def test_a_size_off_the_networks_stride_is_refused_with_the_nearest(backbone, tmp_path):
    with pytest.raises(SpecError, match=r"18x18, and this network takes multiples of 4 pixels.*16x16"):
        deploykit.export_backbone(backbone, tmp_path / "x", runtime="onnxruntime", image_size=(18, 24, 32))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "coatnet_0_rw_224"])
def test_a_network_of_one_size_is_refused(name, tmp_path):
    with pytest.raises(SpecError, match="takes one image size"):
        deploykit.export_backbone(name, tmp_path / "x", runtime="onnxruntime", image_size=(192, 224, 256))


@pytest.mark.parametrize("runtime", ["torch_compile", "litert", "executorch"])
def test_a_runtime_of_one_size_is_refused_before_any_work(backbone, tmp_path, runtime):
    pytest.importorskip({"torch_compile": "torch", "litert": "ai_edge_litert"}.get(runtime, runtime))
    with pytest.raises(SpecError, match=f"engines of {runtime} take one size.*onnxruntime, openvino, tensorrt"):
        deploykit.export_backbone(backbone, tmp_path / "x", runtime=runtime, image_size=SIZES)
    assert not list(tmp_path.iterdir())


def test_every_corner_is_proved_and_any_size_within_gives_torchs_numbers(bundle, backbone):
    report = json.loads((bundle / "parity.json").read_text())
    assert [each["reference"] for each in report["further"]] == [
        f"torch fp32 at {height}x{width}" for height, width in CORNERS
    ]
    assert all((bundle / corner_file(size)).stat().st_size < 40_000 for size in CORNERS)
    with deploykit.load_bundle(bundle) as model:
        assert model.input_spec.shape == (1, 3, "height", "width")
        assert str(model.input_spec.sizes) == "16x16 to 40x64, best 24x32, in steps of 4"
        for size in [(16, 16), (20, 48), (40, 64)]:
            images = np.random.default_rng(1).normal(size=(1, 3, *size)).astype(np.float32)
            with torch.no_grad():
                wanted = backbone(torch.from_numpy(images)).numpy()
            error = np.linalg.norm(model(images) - wanted) / np.linalg.norm(wanted)
            assert error < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_mobilevit_takes_every_multiple_of_its_patches(runtime, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = deploykit.create_backbone("mobilevit_s", num_classes=10).eval()
    deploykit.export_backbone(network, tmp_path / "range", runtime=runtime, precision="fp32", image_size=(64, 128, 192))
    with deploykit.load_bundle(tmp_path / "range") as model:
        for size in [(64, 64), (128, 128), (192, 192), (64, 192)]:
            images = np.random.default_rng(1).normal(size=(1, 3, *size)).astype(np.float32)
            with torch.no_grad():
                wanted = network(torch.from_numpy(images)).numpy()
            assert sqnr_db(wanted, model(images)) >= 100
        with pytest.raises(SpecError, match="96"):
            model(np.zeros((1, 3, 96, 96), np.float32))


def test_features_of_pixels_have_the_maps_of_each_size(bundles):
    backbone = AnySize(features_only=True)
    with deploykit.load_bundle(bundles / "pixels") as model:
        assert [output.shape for output in model.manifest.outputs] == [
            ("batch", 8, "height/2", "width/2"), ("batch", 16, "height/4", "width/4"),
        ]  # fmt: skip
        pixels = np.random.default_rng(2).integers(0, 256, (3, 40, 20, 3)).astype(np.uint8)
        found, wanted = model(pixels), backbone(normalize(pixels, model.input_spec.preprocessing))
        assert found["stem"].shape == (3, 8, 20, 10) and found["stage1"].shape == (3, 16, 10, 5)
        np.testing.assert_allclose(found["stage1"], wanted["stage1"], atol=1e-4)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((12, 32), "nearest size is 16x32"),
        ((24, 68), "nearest size is 24x64"),
        ((26, 32), "nearest size is 24x32"),
    ],
)
def test_a_size_outside_is_refused_by_name(bundle, size, said):
    images = np.zeros((1, 3, *size), np.float32)
    with deploykit.load_bundle(bundle) as model:
        with pytest.raises(SpecError, match=f"16x16 to 40x64, best 24x32, in steps of 4.*{said}"):
            model(images)
        with pytest.raises(SpecError, match=said):
            list(model.stream([images]))
        with pytest.raises(SpecError, match=said):
            model.input_spec.at(size)
        with pytest.raises(SpecError, match="look like NHWC"):
            model(np.zeros((1, 24, 32, 3), np.float32))


def test_torch_holds_to_the_range_too(backbone):
    model = deploykit.create_backbone(backbone, image_size=SIZES)
    assert model(np.zeros((1, 3, 20, 48), np.float32)).shape == (1, 5)
    with pytest.raises(SpecError, match="nearest size is 40x64"):
        model(np.zeros((1, 3, 80, 80), np.float32))
    assert backbone.input_spec.sizes is None
    assert backbone(np.zeros((1, 3, 80, 80), np.float32)).shape == (1, 5)


def test_verify_compares_at_every_corner_and_sees_a_fault_there(bundle, tmp_path, monkeypatch):
    report = verify_bundle(bundle)
    assert report.passed
    assert [each.reference for each in report.further] == [f"torch fp32 at {h}x{w}" for h, w in CORNERS]
    from deploykit.backends import runtime

    original = runtime.run_in_batches

    def wrong_when_small(model, images):
        outputs = original(model, images)
        return {k: v + 5 for k, v in outputs.items()} if images.shape[2:] == (16, 64) else outputs

    monkeypatch.setattr("deploykit.verification.run_in_batches", wrong_when_small)
    broken = verify_bundle(bundle)
    assert not broken.passed
    with pytest.raises(ParityError, match="torch fp32 at 16x64"):
        broken.raise_for_failures()


def test_streams_and_maps_take_images_of_several_sizes(bundle):
    generator = np.random.default_rng(3)
    images = [generator.normal(size=(3, *size)).astype(np.float32) for size in [(16, 16), (16, 16), (24, 32), (16, 16)]]
    with deploykit.load_bundle(bundle) as model:
        wanted = [model(image[None])[0] for image in images]
        for own in (list(model.map(images)), [each[0] for each in model.stream(image[None] for image in images)]):
            np.testing.assert_allclose(np.stack(own), np.stack(wanted), atol=1e-3)


def test_a_bundle_is_asked_for_by_its_range(bundle):
    with deploykit.create_backbone(bundle, image_size=SIZES) as model:
        assert model.input_spec.sizes.step == 4
    with pytest.raises(SpecError, match="image_size="):
        deploykit.create_backbone(bundle, image_size=(16, 24, 32))
    with pytest.raises(SpecError, match="image_size="):
        deploykit.create_backbone(bundle, image_size=(24, 32))


def test_bench_times_sizes_of_the_range(bundle):
    small, large = bench([bundle], sizes=[(16, 16), (40, 64)], batches=[1], seconds=0.01)
    assert (small.image, large.image) == ("16x16", "40x64")
    with pytest.raises(SpecError, match="nearest size is 40x64"):
        bench([bundle], sizes=[(80, 80)], seconds=0.01)


def test_older_manifests_have_no_range_and_a_range_that_is_none_is_refused(bundle):
    raw = json.loads((bundle / "manifest.json").read_text())
    sizes = raw["input"].pop("sizes")
    assert sizes == {"min": [16, 16], "opt": [24, 32], "max": [40, 64], "step": 4}
    assert decode_manifest(json.dumps(raw).encode(), bundle).input.sizes is None
    for wrong in (
        {**sizes, "opt": [16, 16]},
        {**sizes, "max": [2, 2]},
        {**sizes, "step": 0},
        {**sizes, "step": 1 << 40},
    ):
        raw["input"]["sizes"] = wrong
        with pytest.raises(deploykit.BundleError, match="does not fit schema"):
            decode_manifest(json.dumps(raw).encode(), bundle)


def test_tensorrt_builds_a_profile_of_the_range(backbone, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from deploykit.backends.tensorrt.lower import _profile

    spec = InputSpec(height=24, width=32, batch=2, sizes=SizeRange(min=16, opt=(24, 32), max=(40, 64), step=4))
    assert _profile(spec) == ((2, 3, 16, 16), (2, 3, 24, 32), (2, 3, 40, 64))
    result = deploykit.export_backbone(backbone, tmp_path / "plan", runtime="tensorrt", target="sm89", image_size=SIZES)
    assert result.status in ("built", "parity_checked")
    assert [each.reference for each in result.parity.further] == [f"torch fp32 at {h}x{w}" for h, w in CORNERS]
    assert result.parity.passed


def test_servers_get_dynamic_sides(bundles, tmp_path):
    from deploykit.backends.onnxruntime.serving import SERVING
    from deploykit.bundle import read_manifest
    from deploykit.serving.open_inference import model_settings
    from deploykit.serving.triton import triton_config

    manifest = read_manifest(bundles / "pixels")
    config = triton_config(manifest, SERVING, "any")
    assert "dims: [ -1, -1, 3 ] }" in config
    assert "dims: [ 8, -1, -1 ] }" in config
    assert "dims: [ 24, 32, 3 ], zero_data" in config
    assert json.loads(model_settings(manifest, "any", 1))["inputs"][0]["shape"] == [-1, -1, -1, 3]
