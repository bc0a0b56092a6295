"""The labelled images of a trained network's benchmark, its outliers and its weights."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

import deploykit
from deploykit.accuracy.evaluation import Drop, Evaluation
from deploykit.errors import ImageError, SpecError
from tests.backbones.realistic import randomize
from tests.small_resnet import SMALL
from tests.small_transformers import SHORT_VIT

SHAPE = (3, 4, 4)
PIXELS = np.arange(48, dtype=np.uint8).reshape(SHAPE)
HEADER = bytes((0, 0, 8, 3)) + np.array(SHAPE, ">i4").tobytes()


@pytest.fixture(scope="module")
def fashion(script):
    return script("_fashion")


def test_idx_is_read(fashion, tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(HEADER + PIXELS.tobytes()))
    np.testing.assert_array_equal(fashion.read_idx(path, SHAPE), PIXELS)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"no gzip at all", "is damaged", id="another kind"),
        pytest.param(gzip.compress(HEADER + PIXELS.tobytes())[:-12], "is damaged", id="cut off"),
        pytest.param(gzip.compress(PIXELS.tobytes()), "begins with", id="another header"),
        pytest.param(
            gzip.compress(HEADER[:4] + HEADER[4:].replace(b"\x03", b"\x02") + PIXELS.tobytes()), "begins", id="sides"
        ),
        pytest.param(gzip.compress(HEADER + PIXELS.tobytes()[:-1]), "holds 63 bytes", id="too few values"),
        pytest.param(gzip.compress(HEADER + bytes(1000)), "holds more bytes", id="too many values"),
    ],
)
def test_a_file_that_is_no_such_array_is_told_with_what_to_do(fashion, tmp_path, content, told):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"images\.gz {told}.*apt install dataset-fashion-mnist"):
        fashion.read_idx(path, SHAPE)


def test_a_missing_folder_says_how_to_get_it(script, fashion, tmp_path):
    with pytest.raises(SpecError, match="apt install dataset-fashion-mnist"):
        fashion.read_clothes(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="apt install dataset-fashion-mnist"):
        script("trained_networks").main(["--quick", "--data", str(tmp_path)])


def test_a_class_that_is_none_of_ten_is_refused(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "SIDE", 4)
    sides = np.array((3,), ">i4").tobytes()
    (tmp_path / "t-images-idx3-ubyte.gz").write_bytes(gzip.compress(HEADER + PIXELS.tobytes()))
    labels = tmp_path / "t-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(bytes((0, 0, 8, 1)) + sides + bytes((0, 9, 3))))
    assert fashion._read_part(tmp_path, "t", 3).labels.tolist() == [0, 9, 3]
    labels.write_bytes(gzip.compress(bytes((0, 0, 8, 1)) + sides + bytes((0, 10, 3))))
    with pytest.raises(ImageError, match="the class 10 is none of 0 to 9"):
        fashion._read_part(tmp_path, "t", 3)


@pytest.mark.parametrize(("name", "norms"), [(SMALL, 13), (SHORT_VIT, 7)])
def test_outliers_change_what_norms_give_and_not_what_the_network_gives(script, name, norms):
    outliers = script("_outliers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = randomize(deploykit.create_backbone(name, num_classes=10, image_size=64)).eval()
        images = torch.randn(2, 3, 64, 64)
    planted, count = outliers.with_outliers(backbone)
    assert count == norms
    loud, before = dict(planted.named_parameters()), dict(backbone.named_parameters())
    gains = [key for key, value in before.items() if value.dim() == 1 and key.endswith("weight")]
    assert len(gains) == norms
    for gain in gains:
        assert set((loud[gain] / before[gain]).round().tolist()) == {1.0, 50.0, 200.0}
    with torch.inference_mode():
        expected, found = backbone(images), planted(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_weights_are_trained_once(script, tmp_path):
    trained = script("_trained")
    generator = np.random.default_rng(0)
    data = trained.Labelled(
        images=generator.standard_normal((128, 1, 32, 32)).astype(np.float32), labels=generator.integers(0, 10, 128)
    )
    network = trained.Network(name=SMALL, side=32, steps=1, rate=1e-3)
    with torch.random.fork_rng():
        first = trained.trained(network, data, tmp_path)
        stamp = (tmp_path / f"{SMALL}-1.pt").stat().st_mtime_ns
        again = trained.trained(network, data, tmp_path)
    assert (tmp_path / f"{SMALL}-1.pt").stat().st_mtime_ns == stamp
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_drop_beyond_its_bar_is_told(script):
    benchmark = script("trained_networks")

    def cell(weights: str, points: float):
        drop = Drop(reference="FP32", points=points, interval=(points - 0.2, points + 0.2), agreement=0.98)
        found = Evaluation(
            model="a", runtime="b", precision="int8", device="cpu", images=1000, top1=0.9 - points / 100, drop=drop
        )
        return benchmark.cell_of("resnet18", weights, "openvino", found)

    assert cell("trained", 0.3).met and cell("outliers", 0.5).met and not cell("trained", 0.31).met
    assert cell("trained", 0.31).fp32 == pytest.approx(90)
    told = benchmark.summary([[cell("trained", 0.1)], [cell("outliers", 0.7)]])
    assert told.splitlines() == [
        "1 of 2 drops are beyond their bars:",
        "  resnet18, outliers, openvino: +0.70 ±0.20 (bar 0.5)",
    ]
    assert "MISSED" in benchmark.line([cell("outliers", 0.7)])
