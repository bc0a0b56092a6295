"""Options of a backbone that cannot be: each is refused with its name, its value and what to give."""

from __future__ import annotations

import pytest

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import register_backbone
from deploykit.backbones.request import BackboneRequest, make_request
from deploykit.backbones.resnet import ResNet
from deploykit.errors import SpecError
from deploykit.spec import SizeRange


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features_only": 1}, r"features_only is 1; give True or False"),
        ({"new_head": "yes"}, r"new_head is 'yes'; give True or False"),
        ({"checkpoint_key": 3}, r"checkpoint_key is 3; give the name of a state dict in the file"),
        ({"num_classes": "ten"}, r"num_classes is 'ten'; give an int"),
        ({"in_channels": True}, r"in_channels is True; give an int"),
        ({"output_indices": 3}, r"output_indices is 3; give level indices, such as \(2, 3, 4\)"),
        ({"output_indices": "234"}, r"output_indices is '234'; give level indices"),
        ({"output_indices": [2, 3.5]}, r"one of output_indices is 3\.5; give an int"),
        ({"preprocessing": "imagenet"}, r"preprocessing is a str; give a Preprocessing, or a dict of its fields"),
        ({"preprocessing": {"means": 0.5}}, r"means.*mean"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_named(options, message):
    with pytest.raises(SpecError, match=message):
        make_request(**options)


def test_a_range_of_sizes_is_taken_as_it_is_and_its_best_is_the_size():
    sizes = SizeRange(min=(64, 64), opt=(96, 128), max=(192, 192))
    request = BackboneRequest(image_size=sizes)
    assert (request.image_sizes, request.image_size) == (sizes, (96, 128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, r"num_classes is -1; it must be 0 \(embedding\) or more"),
        ({"in_channels": 0}, "in_channels is 0; it must be at least 1"),
        ({"patch_size": 0}, "patch_size is 0; it must be at least 1"),
    ],
    ids=str,
)
def test_a_number_outside_its_range_is_named(options, message):
    with pytest.raises(SpecError, match=message):
        BackboneOptions(**options)


@pytest.mark.parametrize("name", ["resnet18", "efficient_net"])
def test_a_name_that_is_taken_is_not_given_to_another_backbone(name):
    class Mine(ResNet):
        variants = {name: ResNet.variants["resnet18"]}  # noqa: RUF012

    with pytest.raises(SpecError, match=rf"the backbone name '{name}' is taken\. Choose another name for Mine"):
        register_backbone(Mine)
