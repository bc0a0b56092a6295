"""Features in Parquet: the rows are those of calls, whatever stopped the run on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import deploykit
from deploykit.errors import SpecError, StorageError
from deploykit.extraction import JOB_FILE, extract
from tests.accuracy.small_classifier import export, pixels

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export(tmp_path_factory.mktemp("bundles") / "features", classes=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(pixels()):
        path = folder / f"class{index % 3}" / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def test_rows_are_those_of_calls(bundle, folder, tmp_path):
    heard = []
    done = extract(folder, bundle, tmp_path / "out.parquet", shard=25, progress=heard.append)
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert (done.rows, done.skipped, done.resumed) == (60, 0, 0)
    assert list(table) == ["image", "label", "error", "deep"]
    files = sorted(folder.rglob("*.png"))
    assert table["image"] == list(map(str, files))
    assert table["label"] == [file.parent.name for file in files]
    assert set(table["error"]) == {None}
    with deploykit.load_bundle(bundle) as engine:
        for row, file in zip(table["deep"][::17], files[::17], strict=True):
            own = engine(deploykit.load_images([file], engine.input_spec))["deep"].mean((2, 3))[0]
            np.testing.assert_allclose(row, own, rtol=1e-4, atol=1e-5)
    assert [event.done for event in heard][-1] == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet"]


def test_whole_maps_and_arrays(bundle, tmp_path):
    extract((pixels()[:5], list("abcde")), bundle, tmp_path / "out.parquet", pool=False)
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert (table["image"], table["label"]) == (list("01234"), list("abcde"))
    with deploykit.load_bundle(bundle) as engine:
        own = engine(deploykit.preprocess(pixels()[3], engine.input_spec))["deep"][0]
    np.testing.assert_allclose(table["deep"][3], own.reshape(-1), rtol=1e-4, atol=1e-5)


def kill_when(shards, words, least):
    """Run the command until it has so many shards, and kill it."""
    script = "import sys; from deploykit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", script, *words], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(shards.glob("*.parquet"))) < least and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_runs_give_the_rows_of_an_unbroken_one(bundle, folder, tmp_path):
    words = ("extract", str(folder), "--bundle", str(bundle), "-o", str(tmp_path / "broken.parquet"), "--shard", "7")
    for least in (1, 3):
        kill_when(tmp_path / ".broken.parquet.shards", words, least)
    if not (tmp_path / "broken.parquet").exists():
        done = extract(folder, bundle, tmp_path / "broken.parquet", shard=7)
        assert done.resumed >= 7
    extract(folder, bundle, tmp_path / "whole.parquet", shard=7)
    assert parquet.read_table(tmp_path / "broken.parquet").equals(parquet.read_table(tmp_path / "whole.parquet"))


@pytest.mark.slow
def test_many_images_killed_five_times_give_the_file_of_an_unbroken_run(bundle, tmp_path):
    images = np.concatenate([np.roll(pixels(), shift, axis=2) for shift in range(34)])[:2000]
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{index:04}.png")
    broken, shards = tmp_path / "broken.parquet", tmp_path / ".broken.parquet.shards"
    words = ("extract", str(tmp_path / "images"), "--bundle", str(bundle), "-o", str(broken), "--shard", "100")
    for least in (2, 5, 8, 11, 14):
        kill_when(shards, words, least)
        assert not broken.exists()
        assert least <= len(list(shards.glob("*.parquet"))) < 20
    done = extract(tmp_path / "images", bundle, broken, shard=100)
    assert (done.rows, done.resumed >= 1400) == (2000, True)
    extract(tmp_path / "images", bundle, tmp_path / "whole.parquet", shard=100)
    assert broken.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_unreadable_images_have_their_reason(bundle, tmp_path):
    for index, image in enumerate(pixels()[:3]):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(deploykit.ImageError, match=r"1\.png"):
        extract(tmp_path, bundle, tmp_path / "out.parquet")
    done = extract(tmp_path, bundle, tmp_path / "out.parquet", skip_corrupt=True)  # as the message says
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert done.skipped == 1
    assert table["deep"][1] is None
    assert "1.png" in table["error"][1]
    assert len(table["deep"][2]) == 32


def test_bad_outputs_are_refused_before_any_work(bundle, folder, tmp_path):
    for name, message in (("out.csv", "ends in .parquet"), ("nowhere/out.parquet", "in none that exists")):
        with pytest.raises(SpecError, match=message):
            extract(folder, bundle, tmp_path / name)
    (tmp_path / "there.parquet").write_bytes(b"mine")
    with pytest.raises(SpecError, match="exists already"):
        extract(folder, bundle, tmp_path / "there.parquet")
    assert (tmp_path / "there.parquet").read_bytes() == b"mine"
    with pytest.raises(SpecError, match="shard is 0"):
        extract(folder, bundle, tmp_path / "out.parquet", shard=0)


def test_the_command_says_what_it_wrote(bundle, folder, tmp_path):
    from tests.cli.conftest import call

    done = call("extract", folder, "--bundle", bundle, "-o", tmp_path / "out.parquet")
    assert done.code == 0, done.err
    assert done.out.endswith("out.parquet: 60 rows.\n")
    assert "extract: 60 of 60 images" in done.err
    assert call("extract", folder, "--bundle", bundle, "-o", tmp_path / "out.parquet").code == 2


def stopped(bundle, images, target, **options):
    """Extract, and stop once the first shard is whole."""

    def stop(event):
        if list(target.with_name(f".{target.name}.shards").glob("*.parquet")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(images, bundle, target, shard=2, progress=stop, **options)
    return target.with_name(f".{target.name}.shards")


def test_shards_of_another_job_are_not_gone_on_with(bundle, tmp_path):
    target = tmp_path / "out.parquet"
    shards = stopped(bundle, pixels()[:6], target)
    with pytest.raises(SpecError, match=r"holds shards of another job, which differs in pool\. Fix: remove"):
        extract(pixels()[:6], bundle, target, shard=2, pool=False)
    with pytest.raises(SpecError, match="which differs in images"):
        extract(pixels()[1:7], bundle, target, shard=2)
    job = (shards / JOB_FILE).read_text()
    (shards / JOB_FILE).write_text("[]")
    with pytest.raises(SpecError, match="which differs in its form"):
        extract(pixels()[:6], bundle, target, shard=2)
    (shards / JOB_FILE).write_text(job)
    (shards / "00000002.part").write_bytes(b"half of a shard")
    assert extract(pixels()[:6], bundle, target, shard=2).resumed >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_a_damaged_shard_is_named(bundle, tmp_path):
    shards = stopped(bundle, pixels()[:6], tmp_path / "out.parquet")
    next(iter(shards.glob("*.parquet"))).write_bytes(b"damaged")
    with pytest.raises(StorageError, match=r"00000000\.parquet cannot be read .*Fix: remove it and run again"):
        extract(pixels()[:6], bundle, tmp_path / "out.parquet", shard=2)
    assert not (tmp_path / "out.parquet").exists()


def test_rows_without_an_image_from_an_earlier_run_need_the_same_leave(bundle, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index, image in enumerate(pixels()[:6]):
        Image.fromarray(image).save(images / f"{index}.png")
    (images / "0.png").write_bytes(b"nothing")
    (images / "1.png").write_bytes(b"nothing")
    target = tmp_path / "out.parquet"
    stopped(bundle, images, target, skip_corrupt=True)
    with pytest.raises(deploykit.ImageError, match=r"2 images could not be read.*pass skip_corrupt=True"):
        extract(images, bundle, target, shard=2)
    assert not target.exists()
    assert extract(images, bundle, target, shard=2, skip_corrupt=True).skipped == 2
    table = parquet.read_table(target).to_pydict()
    assert [row is None for row in table["deep"]] == [True, True, False, False, False, False]


def test_a_file_in_the_way_of_the_shards_is_told(bundle, tmp_path):
    (tmp_path / ".out.parquet.shards").write_text("mine")
    with pytest.raises(StorageError, match=r"out\.parquet cannot be written"):
        extract(pixels()[:2], bundle, tmp_path / "out.parquet")
    assert (tmp_path / ".out.parquet.shards").read_text() == "mine"
