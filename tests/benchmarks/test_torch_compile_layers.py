"""Kernels of oneDNN's verbose lines, by kind."""

from __future__ import annotations

import pytest

HEAD = "onednn_verbose,v1,primitive,exec,cpu"
TAIL = "attr-scratchpad:user,alg:convolution_direct"
DEPTHWISE, PLAIN = "g72mb1_ic72oc72_ih56oh56kh3sh1dh0ph1", "mb1_ic16oc64_ih112oh112kh1sh1dh0ph0"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (f"{HEAD},convolution,brgconv_1x1,forward_inference,src:u8 wei:s8:a dst:u8,{TAIL},{PLAIN},0.25", "int8 conv"),
        (
            f"{HEAD},convolution,brdgmm_dw,forward_inference,src:u8 wei:s8:a dst:f32,{TAIL},{DEPTHWISE},0.5",
            "int8 depthwise",
        ),
        (f"{HEAD},convolution,brg,forward_inference,src:f32 wei:f32:a dst:f32,{TAIL},{DEPTHWISE},1", "float depthwise"),
        (f"{HEAD},convolution,brg,forward_inference,src:f32 wei:f32:a dst:f32,{TAIL},g2{PLAIN},2", "float conv"),
        (f"{HEAD},matmul,brg_matmul,undef,src:u8:a wei:s8:p dst:f32:a,{TAIL},,1x960:960x1000,0.04", "int8 product"),
        (f"{HEAD},reorder,jit:uni,undef,src:f32 dst:u8,{TAIL},,1x3x224x224,0.1", "reorder"),
    ],
)
def test_a_kernel_is_of_the_kind_that_its_line_names(script, line, kind):
    found = script("torch_compile_layers")._kinds(["ended 4.5", line, "onednn_verbose,v1,info,oneDNN v3", line])
    assert dict(found) == {kind: 2 * float(line.rsplit(",", 1)[1])}
