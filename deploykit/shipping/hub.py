"""Bundles in repositories of the model hub, through huggingface_hub: one commit a push, files by the commit's hash."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from deploykit.bundle_files import MOST_NAMED, is_litter
from deploykit.errors import BundleError, DeployKitError, SpecError, TransferError, plain_reason
from deploykit.manifest import MANIFEST, MANIFEST_DIGEST, recorded_names
from deploykit.optional import require
from deploykit.shipping.address import HubAddress
from deploykit.shipping.shipment import OWN, Shipment, arrived_manifest

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may"


class _Sibling(Protocol):
    rfilename: str


class _RepositoryInfo(Protocol):
    sha: str | None
    siblings: list[_Sibling] | None


class _CommitInfo(Protocol):
    oid: str


class _Api(Protocol):
    """The part of ``huggingface_hub.HfApi`` that is used."""

    def repo_info(self, repo_id: str, *, revision: str | None = None) -> _RepositoryInfo: ...
    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> object: ...
    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None: ...
    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str, force_download: bool = False) -> str: ...
    def create_commit(
        self,
        repo_id: str,
        operations: list[object],
        *,
        commit_message: str,
        revision: str | None,
        parent_commit: str | None,
    ) -> _CommitInfo: ...


def push_to_hub(shipment: Shipment, address: HubAddress, *, message: str | None, private: bool) -> str:
    """Commit a bundle to a repository, which is made where there is none; a bundle that is there is replaced.

    Returns:
        The commit's hash.

    Raises:
        SpecError: the revision is a commit, or the folder holds files that are no bundle's.
        TransferError: the hub cannot be reached, or refuses.
        MissingDependency: the package huggingface_hub is not installed.
    """
    if address.revision is not None and _COMMIT.fullmatch(address.revision):
        raise SpecError(f"{address} names a commit, which cannot be changed. Fix: name a branch, or none for main.")
    hub = require("huggingface_hub")
    api = cast("_Api", hub.HfApi())
    with _hub_errors(address, "pushed to"):
        found = _repository_for(api, address, private=private)
        names = _names_in(found, address)
        replaced = _replaced_names(api, address, found, names)
        text = message or f"Add {shipment.manifest.backbone.name} for {shipment.manifest.runtime}"
        operations: list[object] = [
            hub.CommitOperationAdd(path_in_repo=address.named(name), path_or_fileobj=str(shipment.folder / name))
            for name in shipment.files
        ]
        _check_operations(operations, shipment, address)
        operations += [
            hub.CommitOperationDelete(path_in_repo=address.named(name))
            for name in sorted(replaced - shipment.files.keys())
        ]
        done = api.create_commit(
            address.repository,
            operations,
            commit_message=text,
            revision=address.revision,
            parent_commit=found.sha if found is not None else None,
        )
    return done.oid


def pull_from_hub(address: HubAddress) -> tuple[str, dict[str, Path]]:
    """Bring the files of a bundle into the hub's cache on this machine.

    Returns:
        The hash of the commit that the revision names, and the path of each file by its name in the bundle.

    Raises:
        SpecError: no such repository or revision.
        BundleError: it holds no bundle there.
        TransferError: the hub cannot be reached, or refuses.
        MissingDependency: the package huggingface_hub is not installed.
    """
    api = cast("_Api", require("huggingface_hub").HfApi())
    with _hub_errors(address, "pulled from"):
        found = api.repo_info(address.repository, revision=address.revision)
        commit, names = str(found.sha), _names_in(found, address)
        if MANIFEST not in names:
            raise BundleError(f"{address} is not a bundle: it has no {MANIFEST}, but {_listed(names)}.")
        files = _downloaded(api, address, commit, names & {MANIFEST, MANIFEST_DIGEST})
        manifest = arrived_manifest(files, str(address))
        wanted = names & {*manifest.files, *OWN} - files.keys()
        return commit, files | _downloaded(api, address, commit, wanted)


def fetch_again(address: HubAddress, commit: str, names: list[str]) -> dict[str, Path]:
    """Download files once more that the hub's cache holds damaged."""
    api = cast("_Api", require("huggingface_hub").HfApi())
    with _hub_errors(address, "pulled from"):
        return _downloaded(api, address, commit, set(names), force=True)


def _downloaded(
    api: _Api, address: HubAddress, commit: str, names: set[str], *, force: bool = False
) -> dict[str, Path]:
    return {
        name: Path(api.hf_hub_download(address.repository, address.named(name), revision=commit, force_download=force))
        for name in sorted(names)
    }


def _repository_for(api: _Api, address: HubAddress, *, private: bool) -> _RepositoryInfo | None:
    """Return what is on a branch; a repository or a branch that is not there is made. None: an empty repository."""
    errors = require("huggingface_hub.errors")
    try:
        return api.repo_info(address.repository, revision=address.revision)
    except errors.RevisionNotFoundError:
        pass
    except errors.RepositoryNotFoundError:
        api.create_repo(address.repository, private=private, exist_ok=True)
    if address.revision is None:
        return None
    api.create_branch(address.repository, branch=address.revision, exist_ok=True)
    return api.repo_info(address.repository, revision=address.revision)


def _names_in(found: _RepositoryInfo | None, address: HubAddress) -> set[str]:
    """Return the names of the files below the address's folder."""
    names = [each.rfilename for each in (found.siblings or ())] if found is not None else []
    start = address.named("")
    return {name.removeprefix(start) for name in names if name.startswith(start)}


def _replaced_names(api: _Api, address: HubAddress, found: _RepositoryInfo | None, names: set[str]) -> set[str]:
    """Return the files of the bundle that is replaced; none where there is none.

    Raises:
        SpecError: there are files that are no bundle's.
    """
    own = names & set(OWN)
    if MANIFEST in names and found is not None:
        manifest = _downloaded(api, address, str(found.sha), {MANIFEST})[MANIFEST]
        own |= names & recorded_names(manifest.read_bytes(), Path(f"{address}/{MANIFEST}"))
    others = {name for name in names - own if not is_litter(name) and not _is_bundles(name, names)}
    if others:
        raise SpecError(
            f"{address} holds files that are no bundle's: {_listed(others)}. "
            f"Fix: push to a folder of it, such as {address}/bundle, or to another repository."
        )
    return own


def _is_bundles(name: str, names: set[str]) -> bool:
    """Return whether a file lies in a bundle further down, which is not touched."""
    return any(f"{parent}/{MANIFEST}" in names for parent in Path(name).parents if parent.name)


def _check_operations(operations: list[object], shipment: Shipment, address: HubAddress) -> None:
    """Refuse to commit other bytes than those that were verified, as far as the hub's client has hashed them."""
    for operation in operations:
        name = str(getattr(operation, "path_in_repo", "")).removeprefix(address.named(""))
        info = getattr(operation, "upload_info", None)
        record = shipment.files[name]
        if info is not None and (info.size != record.size or info.sha256.hex() != record.sha256):
            raise BundleError(f"{shipment.folder / name} was replaced while it was pushed. Fix: push the bundle again.")


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:MOST_NAMED]
    return ", ".join(shown) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "") or "no files"


@contextmanager
def _hub_errors(address: HubAddress, what: str) -> Iterator[None]:
    """Raise the errors of the hub's client, of its HTTP library and of the system as deploykit's own."""
    errors = require("huggingface_hub.errors")
    try:
        yield
    except DeployKitError:
        raise
    except (errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise SpecError(f"{address} names no revision of that repository: {plain_reason(error)}. Check it.") from error
    except errors.RepositoryNotFoundError as error:
        raise SpecError(
            f"the model hub shows no repository {address.repository}: {plain_reason(error)}. "
            f"Check the name. {_LOGIN} see it, where it is private."
        ) from error
    except Exception as error:
        cause = error.__cause__ or error  # of one file of several that are uploaded
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            remedy = f"{_LOGIN} do that."
        elif status in (409, 412):
            remedy = "Somebody else changed it meanwhile: try again."
        else:
            remedy = "Check the network and HF_ENDPOINT, and try again; nothing was left half-written."
        raise TransferError(f"{address} cannot be {what}: {plain_reason(cause)}. {remedy}") from error
