"""Names of what a module returns, and what is refused."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from deploykit.backbones.module_outputs import check_follows_batch, check_outputs, is_positional, named_outputs
from deploykit.errors import SpecError

MAP, LOGITS = torch.zeros(1, 8, 4, 4), torch.zeros(1, 10)
Levels = namedtuple("Levels", "low high")


@dataclass
class Output:
    maps: Any
    attentions: Any = None


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (MAP, ["0"]),
        ([MAP, None, (MAP, MAP)], ["0", "2.0", "2.1"]),
        ({"a": MAP, "b": {"c": MAP, "d": None}}, ["a", "b.c"]),
        (OrderedDict(out=MAP, aux=[MAP]), ["out", "aux.0"]),
        (Levels(MAP, {"x": MAP}), ["low", "high.x"]),
        (Output([MAP, MAP]), ["maps.0", "maps.1"]),
        ({1: MAP, 2.5: MAP}, ["1", "2.5"]),
    ],
)
def test_a_name_is_the_path_to_the_tensor(raw, names):
    assert list(named_outputs(raw)) == names


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"a.b": MAP, "a": {"b": MAP}}, "two outputs whose name is 'a.b'"),
        ({1: MAP, "1": MAP}, "two outputs whose name is '1'"),
        ({"": MAP}, "empty key"),
        ({"a": {"": MAP}}, "empty key"),
    ],
)
def test_names_that_no_graph_can_have_are_refused(raw, message):
    with pytest.raises(SpecError, match=message):
        named_outputs(raw)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"a": MAP, "tokens": torch.zeros(1, 5, 8)}, r"'tokens' has 3 dimensions"),
        ({"a": MAP, "logits": LOGITS}, r"'logits' has 2 dimensions"),
        ({"a": MAP, "mask": MAP.long()}, r"'mask' holds int64"),
        ({"a": MAP, "wave": MAP.to(torch.complex64)}, r"'wave' holds complex64"),
        ({"a": MAP, "text": "text"}, r"'text' is no tensor"),
        ({"a": MAP, "part": MAP[:, :0]}, r"'part' is empty"),
        ({"a": MAP, "flat": torch.zeros(8, 4, 4, 4)}, r"'flat' has a first dimension of 8"),
        ({"a": MAP, "thin": MAP.to_sparse()}, r"'thin' is a sparse_coo tensor"),
        ({"a\nb": MAP}, "printable"),
        ({"a ": MAP}, "no blank"),
        ({"a" * 300: MAP}, "at most 200"),
        ({}, "gives nothing"),
    ],
)
def test_an_output_that_is_no_map_is_named(outputs, message):
    with pytest.raises(SpecError, match=message):
        check_outputs(outputs, "net", (1, 3, 8, 8))


def test_maps_or_one_row_are_taken():
    check_outputs({"0": LOGITS}, "net", (1, 3, 8, 8))
    check_outputs({"a/b": MAP, "ü ñ": MAP.half(), "a.b": MAP.double()}, "net", (1, 3, 8, 8))


def test_an_output_that_does_not_follow_the_batch_is_named():
    check_follows_batch({"a": torch.zeros(2, 8, 4, 4)}, "net", 2)
    with pytest.raises(SpecError, match=r"'position' of net .* is a constant"):
        check_follows_batch({"a": torch.zeros(2, 8, 4, 4), "position": MAP}, "net", 2)


def test_positions_are_told_from_names():
    assert is_positional("0")
    assert is_positional("2.1")
    assert not is_positional("a.1")
