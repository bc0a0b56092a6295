"""Addresses of bundles: what each form means, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit.errors import SpecError
from deploykit.shipping.address import HubAddress, OciAddress, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://owner/name", HubAddress(repository="owner/name")),
        ("hf://owner/name@v1.0", HubAddress(repository="owner/name", revision="v1.0")),
        ("hf://owner/name@main/cpu/int8", HubAddress(repository="owner/name", revision="main", folder="cpu/int8")),
        ("hf://owner/name/cpu/", HubAddress(repository="owner/name", folder="cpu")),
        ("hf://owner/name@refs%2Fpr%2F1", HubAddress(repository="owner/name", revision="refs/pr/1")),
        ("oci:models", OciAddress(path=Path("models"))),
        ("oci:models:1.0", OciAddress(path=Path("models"), tag="1.0")),
        ("oci:/a:b/models", OciAddress(path=Path("/a:b/models"))),
        ("oci:models@sha256:" + "0" * 64, OciAddress(path=Path("models"), digest="sha256:" + "0" * 64)),
    ],
)
def test_an_address_says_where(text, expected):
    assert parse_address(text) == expected
    assert parse_address(str(expected).replace("refs/pr/1", "refs%2Fpr%2F1")) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("models", "", "s3://bucket/name", "hf://name", "hf://owner/", "hf://../name", "hf://owner/name@"),
        *("hf://owner/name@a b", "hf://owner/name/../other", "hf://owner/name@-x", "hf://owner/na me"),
        *("oci:", "oci::1.0", "oci:models:", "oci:models:a b", "oci:models:" + "a" * 129, "oci:models@sha256:12"),
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(SpecError):
        parse_address(text)
