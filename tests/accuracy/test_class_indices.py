"""Which class a label stands for."""

import numpy as np
import pytest

from deploykit.accuracy.class_indices import class_indices
from deploykit.dataset import Dataset
from deploykit.errors import SpecError

NAMES = ("Cardigan", "tabby cat", "cardigan")


def of(*labels):
    return Dataset(name="photos", arrays=np.zeros((len(labels), 8, 8, 3), np.uint8), labels=labels)


def test_names_that_differ_in_case_alone_are_told_apart():
    assert class_indices(of("cardigan", "Cardigan", "tabby_cat"), 3, NAMES, None).tolist() == [2, 0, 1]


def test_names_are_found_in_any_case_where_one_class_has_them():
    assert class_indices(of("Tabby_Cat"), 3, NAMES, None).tolist() == [1]


@pytest.mark.parametrize(
    ("labels", "names", "given"),
    [
        (("CARDIGAN", "tabby cat"), NAMES, None),
        (("crane",), ("crane", "dog", "crane"), None),
        (("crane",), None, ("crane", "dog", "crane")),
    ],
)
def test_a_label_of_several_classes_is_refused(labels, names, given):
    with pytest.raises(SpecError, match="is the name of 2 classes, 0, 2"):
        class_indices(of(*labels), 3, names, given)
