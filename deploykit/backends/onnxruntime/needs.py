"""The oldest ONNX Runtime that reads an engine: by its IR version, opset and operators, not by who wrote it."""

from __future__ import annotations

from deploykit.backends.onnx_header import onnx_needs

RELEASES: tuple[tuple[str, int, int], ...] = (
    ("1.19", 10, 21),
    ("1.21", 10, 22),
    ("1.23", 11, 23),
    ("1.24", 13, 25),
    ("1.25", 13, 26),
)
"""Each release that reads a newer IR version or opset than the one before: (release, IR version, opset of ONNX).

Found by opening one-node models in every release from 1.19 on; onnxruntime.ai/docs/reference/compatibility.html.
"""

KNOWN_OPERATORS: dict[tuple[str, str], str] = {
    ("com.microsoft", "Attention"): "1.19",
    # As old as the first release that loads the plugin which reads it (onnxruntime-qnn's metadata: 1.24.2).
    ("com.microsoft", "EPContext"): "1.24",
    ("com.microsoft", "MatMulIntegerToFloat"): "1.19",
}
"""The operators beside ONNX's own that deploykit writes, with the first release of `RELEASES` that has them
(github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
"""


def least_version(engine: bytes, name: str) -> str | None:
    """Return the oldest release that reads an ONNX file; None: it holds something whose release is not known.

    Raises:
        BundleError: it is not a readable ONNX file.
    """
    needs = onnx_needs(engine, name)
    opset = needs.opsets.get("", 0)
    releases = [
        release for release, ir_version, newest in RELEASES if needs.ir_version <= ir_version and opset <= newest
    ]
    others = [operator for operator in needs.operators if operator[0]]
    if not releases or any(operator not in KNOWN_OPERATORS for operator in others):
        return None
    return max([releases[0], *(KNOWN_OPERATORS[operator] for operator in others)], key=_key)


def _key(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))
