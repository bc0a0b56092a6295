"""A SoC's two numbers belong together; those of SoCs that are not in the table are left to QNN."""

from __future__ import annotations

import pytest

from deploykit.backends.onnxruntime.qnn.socs import SOCS, soc_of
from deploykit.errors import SpecError
from deploykit.target import targets

QUALCOMM = {name: target for name, target in targets().items() if name.startswith("qualcomm-")}


@pytest.mark.parametrize("name", QUALCOMM)
def test_the_targets_here_are_in_the_table(name):
    options = QUALCOMM[name].runtime[0].options
    assert soc_of(options) == options
    assert SOCS[options["soc_model"]][0].lower() in QUALCOMM[name].aliases


def test_a_version_of_another_soc_is_refused_with_the_right_one():
    with pytest.raises(
        SpecError, match=r"57 is the SM8650.* 75, and htp_arch is 69\. Set .*'75'.*SM8450 36, SM8475 42"
    ):
        soc_of({"soc_model": "57", "htp_arch": "69"})
    with pytest.raises(SpecError, match=r"htp_arch is 70\. Set htp_arch to '75'.*another SoC\.$"):
        soc_of({"soc_model": "57", "htp_arch": "70"})


def test_a_soc_that_is_not_in_the_table_is_left_to_qnn():
    assert soc_of({"soc_model": "9999", "htp_arch": "75"}) == {"soc_model": "9999", "htp_arch": "75"}
