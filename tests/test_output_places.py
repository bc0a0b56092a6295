"""No command writes into a bundle, which would not open with a file that is not its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from deploykit.bundle import open_bundle, writing
from deploykit.errors import SpecError
from deploykit.output_places import check_outside_bundles
from tests.backends.bundles import write_bundle
from tests.cli.conftest import call


@pytest.fixture
def bundle(tmp_path) -> Path:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return write_bundle(tmp_path / "bundle", "onnxruntime")


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


COMMANDS = {
    "export": "export mobilenetv3_small_100 --runtime onnxruntime --image-size 64 -o {bundle}/inner",
    "export --dry-run": "export mobilenetv3_small_100 --runtime onnxruntime --dry-run -o {bundle}/a/inner",
    "sweep": "sweep mobilenetv3_small_100 --runtimes onnxruntime --image-size 64 -o {bundle}/inner",
    "compare": "compare {bundle} {bundle} -o {bundle}/changes.json",
    "report": "report {bundle} -o {bundle}/page.html",
    "bench": "bench {bundle} --plot {bundle}/times.png",
    "extract": "extract {photo} --bundle {bundle} -o {bundle}/features.parquet",
    "repository": "repository {bundle} --layout triton -o {bundle}/models",
    "repository of itself": "repository {bundle} --layout triton -o {bundle}",
    "push": "push {bundle} oci:{bundle}/image:v1",
    "pull": "pull oci:{bundle}/../image:v1 -o {bundle}/inner",
    "demo": "demo -o {bundle}",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_command_leaves_a_bundle_as_it_is(bundle, photo, command):
    if command.startswith("pull"):
        assert call("push", bundle, f"oci:{bundle.parent}/image:v1").code == 0
    called = call(*command.format(bundle=bundle, photo=photo).split())
    assert called.code == 2, called.err
    assert f"lies in the bundle {bundle}" in called.err
    assert "outside of it" in called.err
    open_bundle(bundle)


def test_a_link_into_a_bundle_is_followed(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(SpecError, match="lies in the bundle"):
        check_outside_bundles(tmp_path / "link" / "page.html")


def test_names_that_a_bundle_leaves_alone_are_free(bundle):
    assert call("report", bundle, "-o", bundle / "README.md").code == 0
    open_bundle(bundle)


def test_a_bundle_may_replace_itself_and_lie_beside_another(bundle):
    check_outside_bundles(bundle)
    check_outside_bundles(bundle.parent / "beside")


def test_a_bundle_is_not_written_into_another(bundle):
    with pytest.raises(SpecError, match="lies in the bundle"), writing(bundle / "inner"):
        pytest.fail("a place to write into was given")
    open_bundle(bundle)


@pytest.mark.parametrize("command", ["compare {bundle} {bundle} -o {place}.json", "report {bundle} -o {place}.md"])
def test_a_file_in_no_folder_is_refused_before_any_work(bundle, command):
    called = call(*command.format(bundle=bundle, place=bundle.parent / "absent" / "result").split())
    assert called.code == 6
    assert "lies in none that exists" in called.err


def test_a_name_that_is_too_long_is_told(bundle):
    called = call("report", bundle, "-o", bundle.parent / f"{'x' * 250}.md")
    assert called.code == 6
    assert "cannot be written" in called.err
    assert "fault in deploykit" not in called.err


def test_a_repository_that_is_a_file_is_told(bundle, photo):
    called = call("repository", bundle, "--layout", "triton", "-o", photo)
    assert called.code == 2
    assert "is not a folder" in called.err
