"""Where a state dict lies in a checkpoint: nestings, prefixes, averaged weights, and what is ambiguous."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from deploykit.backbones.checkpoint_layout import find_state
from deploykit.backbones.pickle_allowlist import PlainArray
from deploykit.errors import WeightsError, WeightsWarning

NAMES = ("stem.weight", "blocks.0.norm.weight", "blocks.0.conv.weight", "blocks.1.conv.weight", "norm.weight")


def state(seed=0, prefix="", extra=()):
    generator = torch.Generator().manual_seed(seed)
    return {f"{prefix}{name}": torch.randn(3, 2, generator=generator) for name in (*NAMES, *extra)}


RAW, EMA, OTHER = state(0), state(1), state(2)


def prefixed(prefix, tensors=RAW):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def find(content, key=None):
    return find_state(content, NAMES, source="c.pth", key=key)


def same(found, tensors):
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def quietly(content, key=None):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return find(content, key)


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "_orig_mod.", "model.", "backbone.", "net.", "encoder.", "network.", "student."),
        *("module._orig_mod.", "_orig_mod.module.", "model.module.", "model._orig_mod.backbone.", "encoder.model."),
        *("_fsdp_wrapped_module.", "module.encoder.backbone.body."),
    ],
)
@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model",), ("model_state_dict",), ("net",), ("a", "b", "c")])
def test_any_nesting_and_any_prefix_is_found(prefix, keys):
    content = prefixed(prefix)
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "loss": 0.5}
    assert same(quietly(content).tensors, RAW)


def test_wrappers_inside_of_names_are_taken_off():
    inner = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in RAW.items()}
    assert same(quietly({"state_dict": inner}).tensors, RAW)
    sharded = {
        name.replace("conv.", "_fsdp_wrapped_module._checkpoint_wrapped_module.conv."): RAW[name] for name in RAW
    }
    assert same(quietly(sharded).tensors, RAW)


@pytest.mark.parametrize(
    ("content", "ema", "raw"),
    [
        ({"state_dict": RAW, "state_dict_ema": EMA, "arch": "x"}, "state_dict_ema", "state_dict"),
        ({"model": RAW, "model_ema": EMA}, "model_ema", "model"),
        ({"model": RAW, "ema": {"module": EMA, "decay": 0.9}}, "ema.module", "model"),
        ({"ema_model": prefixed("module.", EMA), "net": RAW}, "ema_model.module", "net"),
        (
            {"state_dict": {**prefixed("model."), **prefixed("ema.module.", EMA)}},
            "state_dict.ema.module",
            "state_dict.model",
        ),
        ({"state_dict": {**RAW, **prefixed("modelEMA.", EMA)}}, "state_dict.modelEMA", "state_dict"),
        ({**RAW, **prefixed("ema.", EMA)}, "ema", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_averaged_weights_go_first_and_both_can_be_chosen(content, ema, raw):
    with pytest.warns(WeightsWarning, match=rf"averaged weights \(EMA\) in {ema} .*checkpoint_key='{ema}'"):
        found = find(content)
    assert same(found.tensors, EMA)
    assert found.outside == {}
    assert same(quietly(content, ema).tensors, EMA)
    assert same(quietly(content, raw).tensors, RAW)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": RAW, "state_dict_ema": None},
        {"model": RAW, "ema": {"decay": 0.999, "updates": torch.tensor(10)}},
        {"state_dict": RAW, "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 2)}}, "param_groups": []}},
        {"gemma": RAW, "schema": {"a": 1}},
    ],
)
def test_what_is_no_average_of_this_network_is_not_taken_for_one(content):
    assert same(quietly(content).tensors, RAW)


def test_averaged_weights_alone_are_taken_without_a_word():
    assert same(quietly({"model_ema": EMA}).tensors, EMA)


@pytest.mark.parametrize(
    ("content", "places"),
    [
        ({"student": RAW, "teacher": OTHER}, "student, teacher"),
        ({"state_dict": RAW, "best": OTHER, "epoch": 1}, "state_dict, best"),
        ({"ema_0.99": RAW, "ema_0.9999": OTHER, "model": EMA}, "ema_0.99, ema_0.9999"),
        ({"state_dict": {**prefixed("a."), **prefixed("b.", OTHER)}}, "state_dict.a, state_dict.b"),
    ],
)
def test_several_state_dicts_are_not_chosen_from_silently(content, places):
    with pytest.raises(WeightsError, match=f"2 state dicts of this network: {places}.*checkpoint_key="):
        find(content)
    first, second = places.split(", ")
    assert not same(find(content, first).tensors, find(content, second).tensors)


def test_one_network_under_two_names_is_one_network():
    content = {"state_dict": {**prefixed("model."), **prefixed("net.")}}
    assert same(quietly(content).tensors, RAW)


def test_a_key_may_be_the_start_of_a_place_and_a_wrong_one_lists_the_places():
    content = {"state_dict": prefixed("model."), "other": prefixed("x.", OTHER)}
    assert same(quietly(content, "state_dict").tensors, RAW)
    assert same(quietly(content, "other").tensors, OTHER)
    with pytest.raises(WeightsError, match=r"in 'ema'; it has state_dict\.model, other\.x"):
        find(content, "ema")


def test_tensors_around_the_network_are_kept_apart_and_counters_are_not_told():
    content = {"state_dict": {**prefixed("model."), "loss.weight": torch.ones(10), "step": torch.tensor(3)}}
    found = quietly(content)
    assert same(found.tensors, RAW)
    assert list(found.outside) == ["loss.weight"]
    averaged = {"n_averaged": torch.tensor(5), **prefixed("module.")}
    assert quietly(averaged).outside == {}


def test_arrays_of_numbers_are_tensors_and_other_arrays_are_nothing():
    arrays = {name: PlainArray() for name in NAMES}
    for name, array in arrays.items():
        array.value = RAW[name].numpy().astype(">f4")
    names = PlainArray()
    names.value = np.array(["cat", "dog"])
    assert same(quietly({"model": arrays, "names": names}).tensors, RAW)


def test_tensors_without_a_prefix_are_the_networks_own():
    found = quietly({**RAW, "extra.weight": torch.ones(3)})
    assert found.outside == {}
    assert "extra.weight" in found.tensors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors"),
        ({"state_dict": {"a": "text"}, "epoch": 3}, r"holds no tensors \(state_dict \(dict\), epoch \(int\)\)"),
        ({"a.weight": torch.ones(1)}, r"none of its 1 tensors \(a\.weight, \.\.\.\) has one of the names stem\.weight"),
    ],
)
def test_a_file_without_the_network_says_what_it_has(content, message):
    with pytest.raises(WeightsError, match=message):
        find(content)


def test_parts_that_share_a_few_names_are_not_offered_as_state_dicts():
    content = {f"{number}.conv.weight": torch.ones(1) for number in range(5)}
    with pytest.raises(WeightsError, match=r"no state dict of this network: at most 1 of its 6 tensors .*\(0, 1, 2, "):
        find_state(content, (*NAMES, "conv.weight"), source="c.pth", key=None)


@pytest.mark.parametrize(
    ("average", "place"),
    [
        ([*EMA.values()], "ema"),
        ({"decay": 0.99, "shadow_params": [*EMA.values()], "collected_params": None}, "ema.shadow_params"),
    ],
)
def test_averages_without_names_are_not_passed_over_silently(average, place):
    with pytest.warns(WeightsWarning, match=rf"\(EMA\) in {place} without names, .* took the raw ones in model"):
        found = find({"model": RAW, "ema": average})
    assert same(found.tensors, RAW)
    assert same(quietly({"model": RAW, "ema": average}, "model").tensors, RAW)


def test_the_best_match_is_taken_where_none_is_whole():
    content = {"model": {name: RAW[name] for name in NAMES[:-1]}, "loss": {"norm.weight": torch.ones(1)}}
    assert quietly(content).place.name == "model"
