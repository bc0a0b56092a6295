"""The sentinel for an option that was not given."""

import copy
import pickle

from deploykit.unset import UNSET, Unset


def test_unset_is_one_object_that_is_true_and_survives_copies():
    assert copy.deepcopy(UNSET) is UNSET
    assert pickle.loads(pickle.dumps(UNSET)) is UNSET  # noqa: S301
    assert Unset("UNSET") is UNSET
    assert bool(UNSET)
    assert UNSET not in (None, False, 0, "")
    assert (repr(UNSET), str(UNSET)) == ("UNSET", "UNSET")
