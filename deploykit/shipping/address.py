"""Where bundles are pushed to and pulled from: ``hf://owner/name[@revision][/folder]`` and ``oci:PATH[:tag]``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from deploykit.errors import SpecError

HUB, OCI = "hf://", "oci:"
DEFAULT_TAG = "latest"

FORMS = f"{HUB}owner/name[@revision][/folder] or {OCI}PATH[:tag]"

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_REVISION = re.compile(r"[\w.][\w.-]*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class HubAddress:
    """A folder of a model hub repository: ``folder`` is empty for its top; ``revision`` None: its main branch."""

    repository: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.repository}{revision}{f'/{self.folder}' if self.folder else ''}"

    def named(self, name: str) -> str:
        """Return what a file of the bundle is called in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(frozen=True, kw_only=True)
class OciAddress:
    """A manifest in an OCI image layout, a folder: the one that has a tag, or the one of a digest."""

    path: Path
    tag: str = DEFAULT_TAG
    digest: str | None = None

    def __str__(self) -> str:
        return f"{OCI}{self.path}{f'@{self.digest}' if self.digest else f':{self.tag}'}"


Address: TypeAlias = HubAddress | OciAddress


def parse_address(text: str) -> Address:
    """Parse an address.

    Raises:
        SpecError: it has neither form.
    """
    if text.startswith(HUB):
        return _hub_address(text)
    if text.startswith(OCI):
        return _oci_address(text)
    raise SpecError(f"{text!r} is no place to push to or to pull from; expected {FORMS}.")


def _hub_address(text: str) -> HubAddress:
    owner, _, rest = text.removeprefix(HUB).partition("/")
    first, _, folder = rest.partition("/")
    name, at, revision = first.partition("@")
    repository = f"{owner}/{name}"
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise SpecError(f"{text!r} names no repository; expected {HUB}owner/name[@revision][/folder].")
    revision = revision.replace("%2F", "/").replace("%2f", "/")  # a branch such as refs/pr/1
    if at and not all(_REVISION.fullmatch(part) for part in revision.split("/")):
        raise SpecError(f"{text!r} has the revision {revision!r}; expected a branch, a tag or a commit.")
    folder = folder.strip("/")
    if folder and (".." in PurePosixPath(folder).parts or str(PurePosixPath(folder)) != folder or "\\" in folder):
        raise SpecError(f"{text!r} names the folder {folder!r}; expected a plain path below the repository.")
    return HubAddress(repository=repository, revision=revision or None, folder=folder)


def _oci_address(text: str) -> OciAddress:
    rest = text.removeprefix(OCI)
    path, at, digest = rest.rpartition("@")
    if at and digest.startswith("sha256:"):
        if not _DIGEST.fullmatch(digest):
            raise SpecError(f"{text!r} has the digest {digest!r}; expected sha256: and 64 digits of hexadecimal.")
        return OciAddress(path=_folder(path, text), digest=digest)
    path, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        return OciAddress(path=_folder(rest, text))
    if not _TAG.fullmatch(tag):
        raise SpecError(f"{text!r} has the tag {tag!r}; expected up to 128 letters, digits, '.', '_' and '-'.")
    return OciAddress(path=_folder(path, text), tag=tag)


def _folder(path: str, text: str) -> Path:
    if not path or "\0" in path:
        raise SpecError(f"{text!r} names no folder; expected {OCI}PATH[:tag].")
    return Path(path).expanduser()
