"""Checkpoint files: what is read, what is named, and that no code of theirs ever runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pathlib
import pickle
import sys
import threading
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deploykit.backbones.checkpoint import read_checkpoint
from deploykit.backbones.checkpoint_names import is_checkpoint_name
from deploykit.backbones.pickle_allowlist import ALLOWED, allowed_globals
from deploykit.errors import WeightsError

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}
LEGACY = {"_use_new_zipfile_serialization": False}

METADATA = {
    "Namespace": argparse.Namespace(lr=0.1, output=pathlib.Path("out")),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
    "path": pathlib.PurePosixPath("a/b"),
    "defaultdict": collections.defaultdict(list, loss=[1.0]),
    "ordered": collections.OrderedDict(a=1),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "float64": np.float64(0.93),
    "bool_": np.bool_(True),
    "array": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big-endian": np.array([1, 2], ">i4"),
    "strings": np.array(["cat", "dog"]),
    "dtype": np.dtype("float32"),
    "torch dtype": torch.bfloat16,
    "datetime": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
    "slice": slice(1, 2),
}


@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.parametrize("form", [{}, LEGACY], ids=["zip", "legacy"])
def test_plain_metadata_beside_the_tensors_is_no_hindrance(tmp_path, kind, form):
    torch.save({"state_dict": STATE, "extra": METADATA[kind]}, tmp_path / "c.pth", **form)
    content = read_checkpoint(tmp_path / "c.pth").content
    assert torch.equal(content["state_dict"]["conv.weight"], STATE["conv.weight"])


def test_metadata_keeps_its_values(tmp_path):
    torch.save(METADATA, tmp_path / "c.pth")
    content = read_checkpoint(tmp_path / "c.pth").content
    assert content["Namespace"].lr == 0.1
    assert content["float64"] == np.float64(0.93)
    np.testing.assert_array_equal(content["array"].value, METADATA["array"])
    np.testing.assert_array_equal(content["big-endian"].value, [1, 2])
    assert content["defaultdict"] == {"loss": [1.0]}


class Attack:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('attacked').touch()",))


class Config:
    def __init__(self):
        self.lr = 0.1


class ByMethod:
    def __reduce__(self):
        return (getattr, (pathlib.Path("attacked"), "touch"))


class Objects:
    def __reduce__(self):
        return (np.array, ([1],))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Attack(), "builtins.exec"),
        (Config(), f"{__name__}.Config"),
        (ByMethod(), "builtins.getattr"),
        (Objects(), "numpy.array"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (print, "builtins.print"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("form", [{}, LEGACY], ids=["zip", "legacy"])
def test_every_other_name_is_refused_and_named(tmp_path, monkeypatch, value, name, form):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "extra": value}, "c.pth", **form)
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")) as caught:
        read_checkpoint(pathlib.Path("c.pth"))
    assert "pickled code" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert not pathlib.Path("attacked").exists()


def test_the_names_of_configuration_libraries_are_refused(tmp_path):
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = dict_config = type("DictConfig", (dict,), {"__module__": "omegaconf.dictconfig"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, "omegaconf.dictconfig", module)
        torch.save({"state_dict": STATE, "cfg": dict_config(lr=1)}, tmp_path / "c.ckpt")
    with pytest.raises(WeightsError, match=r"omegaconf\.dictconfig\.DictConfig"):
        read_checkpoint(tmp_path / "c.ckpt")


def test_an_array_of_objects_is_refused(tmp_path):
    torch.save({"state_dict": STATE, "extra": np.array([{}], dtype=object)}, tmp_path / "c.pth")
    with pytest.raises(WeightsError):
        read_checkpoint(tmp_path / "c.pth")


def test_the_remedy_for_pickled_code_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "extra": Config()}, "c.pth")
    torch.save(torch.load("c.pth", weights_only=False)["state_dict"], "weights.pth")
    assert read_checkpoint(pathlib.Path("weights.pth")).content.keys() == STATE.keys()


def test_the_process_allows_nothing_more_afterwards(tmp_path):
    torch.save({"state_dict": STATE, "args": METADATA["Namespace"]}, tmp_path / "c.pth")
    before = set(map(str, torch.serialization.get_safe_globals()))
    threads = [threading.Thread(target=read_checkpoint, args=(tmp_path / "c.pth",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(map(str, torch.serialization.get_safe_globals())) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pth", weights_only=True)


def test_nothing_in_the_table_runs_code_or_touches_files():
    assert not {name for name in ALLOWED if name.partition(".")[0] in ("os", "sys", "subprocess", "torch", "deploykit")}
    with allowed_globals():
        pass


# Files that are not what they seem.


def zip_of(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def broken(tmp_path):
    torch.save(STATE, tmp_path / "whole.pth")
    save_file(STATE, str(tmp_path / "whole.safetensors"))
    whole = (tmp_path / "whole.pth").read_bytes()
    tensors = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes(whole[:-40])
    (tmp_path / "cut.safetensors").write_bytes(tensors[:-4])
    (tmp_path / "text.pth").write_bytes(b"<html>not found</html>")
    for name in ("pointer.pth", "pointer.safetensors"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "tensors.pth").write_bytes(tensors)
    (tmp_path / "zip.safetensors").write_bytes(whole)
    zip_of(tmp_path / "arrays.pth", a=b"1")
    zip_of(tmp_path / "inside.pth", **{"c/data.pkl": b"\x80\x02broken", "c/version": b"3"})
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    torch.save(STATE, tmp_path / "protocol.pth", pickle_protocol=4)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "script.pt"))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*TorchScript.*:Warning")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.pth", "is empty"),
        ("cut.pth", "its end is missing"),
        ("cut.safetensors", "its header is damaged, or its end is missing"),
        ("text.pth", "torch.save did not write it"),
        ("text.pth", "it is a web page"),
        ("pointer.pth", "run `git lfs pull`"),
        ("pointer.safetensors", "run `git lfs pull`"),
        ("tensors.pth", "rename it to .safetensors"),
        ("zip.safetensors", "rename it to .pth"),
        ("arrays.pth", "a zip archive that torch.save did not write"),
        ("inside.pth", "it is damaged inside"),
        ("plain.pth", "torch.save did not write it"),
        ("protocol.pth", "its pickle protocol is newer"),
        ("list.pth", "holds a list; expected a state dict"),
        ("script.pt", "is a TorchScript archive"),
        ("folder", "is a folder without model.safetensors"),
        ("absent.pth", "there is no file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_our_words(broken, name, message):
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(broken / name)
    text = str(caught.value)
    assert message in text
    assert name in text
    assert "\n" not in text
    assert "weights_only` argument" not in text


@pytest.mark.parametrize("name", ["whole.pth", "legacy.pth", "whole.safetensors"])
def test_a_file_with_any_bytes_changed_is_read_or_a_weights_error(tmp_path, name):
    content = {"state_dict": STATE, "args": METADATA["Namespace"], "array": METADATA["array"]}
    whole = tmp_path / name
    save_file(STATE, str(whole)) if name.endswith("tensors") else torch.save(
        content, whole, **(LEGACY if name == "legacy.pth" else {})
    )
    original, generator = whole.read_bytes(), np.random.default_rng(0)
    for _ in range(80):
        damaged = bytearray(original)
        for place in generator.integers(0, len(damaged), generator.integers(1, 12)):
            damaged[place] = generator.integers(0, 256)
        whole.write_bytes(
            bytes(damaged[: generator.integers(1, len(damaged) + 1)] if generator.random() < 0.3 else damaged)
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_checkpoint(whole)
        except WeightsError as error:
            assert "\x1b" not in str(error)


def test_a_tuple_is_read_by_position(tmp_path):
    torch.save((STATE, 3), tmp_path / "pair.pth")
    assert read_checkpoint(tmp_path / "pair.pth").content["0"].keys() == STATE.keys()


# Shards, folders and names.


def shards(folder, suffix=".safetensors", **changes):
    write = (lambda state, path: save_file(state, str(path))) if suffix == ".safetensors" else torch.save
    names = [f"model-0000{number}-of-00002{suffix}" for number in (1, 2)]
    for name, key in zip(names, STATE, strict=True):
        write({key: STATE[key]}, folder / name)
    index = {"metadata": {}, "weight_map": dict(zip(STATE, names, strict=True)) | changes}
    path = folder / f"model{suffix}.index.json"
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_gives_the_tensors_of_its_shards(tmp_path, suffix):
    content = read_checkpoint(shards(tmp_path, suffix)).content
    assert all(torch.equal(content[key], value) for key, value in STATE.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv.bias": "../elsewhere.safetensors"}, "expected checkpoint files beside it"),
        ({"conv.bias": "model.safetensors.index.json"}, "expected checkpoint files beside it"),
        ({"conv.bias": "absent.safetensors"}, "are not beside it"),
        ({"other": "model-00001-of-00002.safetensors"}, "which it lacks"),
    ],
)
def test_an_index_that_does_not_hold_together_is_refused(tmp_path, changes, message):
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(shards(tmp_path, **changes))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "no json"])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "m.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"is empty|is not the index|expected checkpoint files"):
        read_checkpoint(tmp_path / "m.safetensors.index.json")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_the_hubs_layout_gives_its_checkpoint(tmp_path, name):
    save_file(STATE, str(tmp_path / name)) if name.endswith("tensors") else torch.save(STATE, tmp_path / name)
    assert read_checkpoint(tmp_path).path.name == name


@pytest.mark.parametrize("name", ["a.pth.tar", "epoch=3.ckpt", "A.PTH", "x.safetensors.index.json", "w.bin"])
def test_names_of_checkpoints_are_known(name):
    assert is_checkpoint_name(name)
    assert not is_checkpoint_name(f"{name}.txt")
