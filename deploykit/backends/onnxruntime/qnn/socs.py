"""Qualcomm's SoCs: QNN's number of each, and the version of its NPU.

The numbers are those of ``QcomChipset`` and ``HtpArch`` in pytorch/executorch,
``backends/qualcomm/serialization/qc_schema.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from deploykit.errors import SpecError

SOCS: dict[str, tuple[str, str]] = {
    "30": ("SM8350", "68"),
    "36": ("SM8450", "69"),
    "39": ("SA8295", "68"),
    "42": ("SM8475", "69"),
    "43": ("SM8550", "73"),
    "45": ("SXR1230P", "73"),
    "46": ("SSG2115P", "73"),
    "52": ("SA8255", "73"),
    "53": ("SXR2230P", "69"),
    "57": ("SM8650", "75"),
    "58": ("SSG2125P", "73"),
    "60": ("SC8380XP", "73"),
    "69": ("SM8750", "79"),
    "72": ("SA8797", "81"),
    "75": ("SXR2330P", "79"),
    "77": ("QCS9100", "73"),
    "87": ("SM8850", "81"),
    "93": ("QCM6490", "68"),
    "95": ("SAR2230P", "81"),
    "96": ("SW6100", "81"),
    "97": ("SM8845", "81"),
}
"""``soc_model`` to the SoC's name and its ``htp_arch``."""


def soc_of(settings: Mapping[str, str]) -> dict[str, str]:
    """Return ``soc_model`` and ``htp_arch`` of a target's settings.

    An SoC that is not in `SOCS` is left to QNN, which refuses those that it does not know.

    Raises:
        SpecError: one is not given, is no number, or they are not of one SoC: QNN would go by ``soc_model`` alone.
    """
    soc = {name: _number(name, settings) for name in ("soc_model", "htp_arch")}
    name, arch = SOCS.get(soc["soc_model"], ("", soc["htp_arch"]))
    if soc["htp_arch"] != arch:
        numbers = [number for number, (_, other) in SOCS.items() if other == soc["htp_arch"]]
        others = f" SoCs of v{soc['htp_arch']}: {', '.join(f'{SOCS[each][0]} {each}' for each in numbers)}."
        raise SpecError(
            f"soc_model {soc['soc_model']} is the {name}, whose NPU has htp_arch {arch}, and htp_arch is "
            f"{soc['htp_arch']}. Set htp_arch to '{arch}', or soc_model to the number of another SoC."
            f"{others if numbers else ''}"
        )
    return soc


def _number(name: str, settings: Mapping[str, str]) -> str:
    value = settings.get(name)
    if value is None or not value.isdecimal() or not value.isascii():
        raise SpecError(
            f"an engine for Qualcomm's NPU is built for one SoC, and {name} is {value!r}; expected a number. Name a "
            "target that has it, or give it as options of the [[runtime]] in a target file of your own."
        )
    return value
