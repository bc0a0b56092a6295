"""``deploykit evaluate``: the table, the JSON and the gate; and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import deploykit
from tests.accuracy.small_classifier import IMAGES, NAMES, export, pixels
from tests.small_resnet import SMALL


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export(tmp_path_factory.mktemp("bundles") / "fp32", labels=NAMES)


@pytest.fixture(scope="module")
def worse(tmp_path_factory, bundle):
    """The same with another classifier: the classes of two outputs are exchanged."""

    from tests.accuracy.small_classifier import small_classifier

    module, shape = small_classifier()
    for parameter in (module[-1].weight, module[-1].bias):
        parameter.data[[0, 1]] = parameter.data[[1, 0]]
    folder = tmp_path_factory.mktemp("bundles") / "worse"
    deploykit.export_backbone(module, folder, runtime="onnxruntime", batch_size="dynamic", labels=NAMES, **shape)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, bundle):
    with deploykit.load_bundle(bundle) as engine:
        logits = engine(deploykit.preprocess(list(pixels()), engine.input_spec)[:8])
        truth = [int(engine(deploykit.preprocess(image, engine.input_spec)).argmax()) for image in pixels()]
    assert logits.shape == (8, len(NAMES))
    file = tmp_path_factory.mktemp("set") / "set.npz"
    np.savez(file, images=pixels(), labels=np.array(truth))
    return file


def test_the_table_has_the_figures(call, bundle, worse, labelled):
    done = call("evaluate", bundle, worse, labelled)
    assert done.code == 0, done.err
    assert f"{IMAGES} images; shares in %" in done.out
    assert "100.00 [" in done.out
    assert "worse: the classes that lost most, against fp32" in done.out
    assert f"evaluate: {IMAGES} of {IMAGES} images" in done.err


def test_the_gate_fails_where_too_much_is_lost(call, bundle, worse, labelled):
    done = call("evaluate", bundle, worse, labelled, "--max-drop", "0.5", "--json")
    told = done.json()
    assert done.code == 1
    assert told["gate"] == {"max_drop": 0.5, "passed": False, "failed": ["worse"]}
    drop = told["evaluations"][1]["drop"]
    assert drop["points"] > 0.5
    assert drop["lost"] * 100 / IMAGES == pytest.approx(drop["points"])
    assert "dropped by more than 0.5 points: worse" in done.err
    assert call("evaluate", bundle, labelled, "--against", bundle, "--max-drop", "0").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-drop", "0.5"), "nothing to compare with"),
        (("--max-drop", "nan", "--against", "x"), "give percentage points"),
        (("--unlabelled",), "no model to compare with"),
        (("--labels", "nowhere.txt"), "cannot be read"),
        (("--against", "no_such_backbone"), "no_such_backbone"),
    ],
)
def test_bad_usage(call, bundle, labelled, words, message):
    done = call("evaluate", bundle, labelled, *words)
    assert (done.code, message in done.err) == (2, True), done.err


def test_a_gate_without_labels_is_refused(call, bundle, worse, labelled):
    done = call("evaluate", bundle, worse, labelled, "--unlabelled", "--max-drop", "1")
    assert (done.code, "no labels" in done.err) == (2, True)
    assert call("evaluate", bundle, worse, labelled, "--unlabelled").code == 0


def test_it_needs_no_torch(bundle, labelled):
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnx_ir')));"
        "from deploykit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "evaluate", str(bundle), str(labelled), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["evaluations"][0]["top1"] == 1.0


def test_a_backbone_in_torch_with_other_weights_is_compared_with_and_that_is_said(call, classifier, photos, tmp_path):
    """The drop is then of both: of the export and of the weights."""
    weights = tmp_path / "other.pth"
    torch.save(deploykit.create_backbone(SMALL).state_dict(), weights)
    done = call("evaluate", classifier, photos, "--against", SMALL, "--weights", weights, "--json")
    assert done.code == 0, done.err
    (found,) = done.json()["evaluations"]
    assert found["drop"]["agreement"] is not None
    assert f"the weights of --against are not those that {classifier} was exported with" in done.err
