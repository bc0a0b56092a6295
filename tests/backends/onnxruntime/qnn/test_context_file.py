"""A file with a context binary is read from its bytes: what else it holds, and where its code lies."""

from __future__ import annotations

import pytest
from onnx import GraphProto, ModelProto, helper

from deploykit.backends.onnxruntime.qnn.context_file import check_context
from deploykit.errors import BundleError


def model_of(*nodes) -> bytes:
    return ModelProto(graph=GraphProto(node=list(nodes))).SerializeToString()


def context(**attributes):
    return helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", **attributes)


def test_code_inside_is_taken():
    check_context(model_of(context(embed_mode=1, ep_cache_context=b"code", main_context=1)), "model.onnx")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of(context(embed_mode=0, ep_cache_context=b"../code.bin")), "keeps its code in another file"),
        (model_of(context(ep_cache_context=b"code")), "keeps its code in another file"),
        (model_of(context(embed_mode=1), context(embed_mode=0)), "keeps its code in another file"),
        (model_of(context(embed_mode=1), helper.make_node("Relu", ["y"], ["z"])), "holds Relu; expected EPContext"),
        (model_of(helper.make_node("EPContext", [], [], domain="mine", embed_mode=1)), "holds mine.EPContext"),
        (model_of(), "holds no node"),
        (b"\x3a\xff", "is not a readable ONNX file"),
    ],
)
def test_anything_else_is_refused(model, message):
    with pytest.raises(BundleError, match=message):
        check_context(model, "model.onnx")
