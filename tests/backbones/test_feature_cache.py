"""The feature cache: what it saves, what it forgets, what it survives."""

import errno
import logging
import os
import threading
import time

import numpy as np
import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.feature_cache import STALE_SECONDS, FeatureCache
from deploykit.backbones.registry import build
from deploykit.errors import SpecError

IMAGE_BYTES = (512 * 2 * 2 + 256 * 4 * 4) * 4


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return build("resnet18", BackboneOptions(features_only=True, output_indices=(3, 4)))


@pytest.fixture
def batches(backbone):
    """The batch size of every run of the backbone."""
    sizes = []
    backbone.conv1.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


def photos(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 64, 64), dtype=np.float32)


def test_second_call_does_not_run_the_backbone(backbone, batches):
    cache = FeatureCache(backbone)
    first = cache(photos(3))
    second = cache(torch.from_numpy(photos(3)))
    assert batches == [3]
    assert list(first) == ["stage3", "stage4"]
    for name in first:
        np.testing.assert_array_equal(first[name], second[name].numpy())
    np.testing.assert_allclose(first["stage4"], backbone(photos(3))["stage4"], rtol=1e-5, atol=1e-5)
    assert (cache.hits, cache.misses, cache.memory_bytes) == (3, 3, 3 * IMAGE_BYTES)


def test_only_the_missing_images_of_a_batch_run(backbone, batches):
    cache = FeatureCache(backbone)
    images = photos(4)
    cache(images[[0, 2]])
    mixed = cache(images[[0, 1, 1, 2, 3]])
    assert batches == [2, 2]
    np.testing.assert_array_equal(mixed["stage4"][1], mixed["stage4"][2])
    np.testing.assert_allclose(mixed["stage4"], backbone(images[[0, 1, 1, 2, 3]])["stage4"], rtol=1e-5, atol=1e-5)


def test_memory_stays_bounded_and_the_oldest_use_goes_first(backbone, batches):
    cache = FeatureCache(backbone, max_bytes=2 * IMAGE_BYTES)
    images = photos(3)
    for position in (0, 1, 0, 2, 0, 1):
        cache(images[[position]])
    assert batches == [1, 1, 1, 1]
    assert cache.memory_bytes == 2 * IMAGE_BYTES


def test_callers_own_what_they_get(backbone):
    cache = FeatureCache(backbone)
    cache(photos(1))["stage4"][:] = 0
    assert cache(photos(1))["stage4"].any()


@pytest.mark.parametrize("change", ["weight", "running_mean"])
def test_changed_weights_never_get_old_features(backbone, batches, change):
    cache = FeatureCache(backbone)
    before = cache(photos(1))["stage4"]
    with torch.no_grad():
        getattr(backbone.bn1, change).add_(1)
    after = cache(photos(1))["stage4"]
    assert batches == [1, 1]
    assert not np.array_equal(before, after)


def test_folder_outlives_the_process(backbone, batches, tmp_path):
    first = FeatureCache(backbone, folder=tmp_path)(photos(2))
    cache = FeatureCache(backbone, folder=tmp_path)
    np.testing.assert_array_equal(cache(photos(2))["stage3"], first["stage3"])
    assert batches == [2]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz", ".npz"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_files_are_dropped_and_computed_again(backbone, batches, tmp_path, damage, caplog):
    expected = FeatureCache(backbone, folder=tmp_path)(photos(1))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged = {"cut": content[: len(content) // 2], "flip": content, "empty": b"", "text": b"not features"}[damage]
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        again = FeatureCache(backbone, folder=tmp_path)(photos(1))
    assert batches == [1, 1]
    assert "computed again" in caplog.text
    np.testing.assert_array_equal(again["stage4"], expected["stage4"])
    FeatureCache(backbone, folder=tmp_path)(photos(1))
    assert batches == [1, 1]


def test_folder_stays_bounded(backbone, tmp_path):
    cache = FeatureCache(backbone, folder=tmp_path, max_bytes=0, max_folder_bytes=3 * IMAGE_BYTES)
    cache(photos(5))
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert 1 <= len(sizes) <= 2
    assert sum(sizes) <= 3 * IMAGE_BYTES
    assert cache.memory_bytes == 0


def test_folder_that_cannot_be_written_leaves_memory(backbone, batches, tmp_path, caplog):
    cache = FeatureCache(backbone, folder=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with caplog.at_level(logging.WARNING):
        cache(photos(1))
        cache(photos(1))
    assert batches == [1]
    assert "memory only" in caplog.text


def test_threads_compute_an_image_once(backbone, batches):
    cache = FeatureCache(backbone)
    images, results = photos(6), []
    starts = (0, 1, 2, 0)

    def work(start):
        results.append((start, cache(images[start : start + 4])["stage4"]))

    threads = [threading.Thread(target=work, args=(start,)) for start in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(batches) == 6
    expected = backbone(images)["stage4"]
    for start, features in results:
        np.testing.assert_allclose(features, expected[start : start + 4], rtol=1e-4, atol=1e-4)


def test_embedding_is_cached_as_one_array(batches):
    model = build("resnet18", BackboneOptions(num_classes=0))
    cache = FeatureCache(model)
    assert cache(photos(2)).shape == cache(torch.from_numpy(photos(2))).shape == (2, 512)
    assert cache.misses == 2


def test_training_mode_is_refused(backbone):
    with pytest.raises(SpecError, match="eval"):
        FeatureCache(backbone.train())(photos(1))


def test_bad_images_are_refused_as_by_the_backbone(backbone):
    with pytest.raises(SpecError, match="float32"):
        FeatureCache(backbone)(photos(1).astype(np.float64))


def test_a_cleared_cache_forgets_memory_and_keeps_its_files(backbone, batches, tmp_path):
    cache = FeatureCache(backbone, folder=tmp_path)
    first = cache(photos(2))
    cache.clear()
    assert cache.memory_bytes == 0
    np.testing.assert_array_equal(cache(photos(2))["stage4"], first["stage4"])
    assert batches == [2], "read from the files"
    cache = FeatureCache(backbone)
    cache(photos(1))
    cache.clear()
    cache(photos(1))
    assert batches == [2, 1, 1]


@pytest.mark.parametrize("sizes", [{"max_bytes": -1}, {"max_folder_bytes": -1}])
def test_a_negative_size_is_refused(backbone, sizes):
    with pytest.raises(SpecError, match=r"max_bytes=.*, max_folder_bytes=.*; expected 0 or more"):
        FeatureCache(backbone, **sizes)


def test_a_folder_below_a_file_is_refused(backbone, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpecError, match=r"the feature cache's folder .*file/cache cannot be made: .*Choose another"):
        FeatureCache(backbone, folder=tmp_path / "file" / "cache")


def test_what_a_killed_process_left_is_removed_once_it_is_old(backbone, tmp_path):
    for name, age in (("old.tmp", STALE_SECONDS + 60), ("young.tmp", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    FeatureCache(backbone, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["young.tmp"]


def test_a_disk_that_fills_leaves_memory_and_no_half_written_file(backbone, batches, tmp_path, monkeypatch, caplog):
    """And says so once."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    cache = FeatureCache(backbone, folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        cache(photos(2))
        cache(photos(3))
    assert batches == [2, 1]
    assert caplog.text.count("No space left on device") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("images", [np.zeros((3, 64, 64), np.float32), photos(0)], ids=["one image", "no image"])
def test_what_is_no_batch_is_refused_as_by_the_backbone(backbone, images):
    with pytest.raises(SpecError) as own:
        backbone(images)
    with pytest.raises(SpecError) as cached:
        FeatureCache(backbone)(images)
    assert str(cached.value) == str(own.value)
