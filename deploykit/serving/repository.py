"""Lay a bundle out as a model server reads it: a model of a repository, which may hold others."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias, cast, get_args

from deploykit.arguments import check_arguments
from deploykit.backends.backend import Backend, Serving, resolve
from deploykit.backends.table import backend_of
from deploykit.errors import BundleError, SpecError, nearest
from deploykit.labels import LABELS_FILE
from deploykit.locks import locked_folder
from deploykit.manifest import MANIFEST, MANIFEST_DIGEST, FileRecord, engine_parts
from deploykit.output_places import check_outside_bundles
from deploykit.places import storage_error
from deploykit.plain_files import digest_of, open_plain
from deploykit.serving import model_server, open_inference, triton, triton_model
from deploykit.shipping.shipment import Shipment, make_shipment

Layout: TypeAlias = Literal["triton", "triton-python", "ovms", "kserve"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_PARTIAL = ".deploykit-partial"
_LOCK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that was written into a repository.

    ``start`` is the command that serves the repository; ``notes`` say what the server may do otherwise than deploykit.
    """

    bundle: str
    repository: str
    layout: Layout
    name: str
    version: int
    files: tuple[str, ...]
    start: str
    notes: tuple[str, ...]


def write_repository(
    bundle: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    layout: Layout,
    name: str | None = None,
    version: int = 1,
) -> ServedModel:
    """Add a bundle to the model repository of a server.

    The engine's files are those of the bundle, byte for byte. Another version of a model that is there is added beside
    the earlier ones, where both have the same inputs and outputs; a version that is there is never replaced.

    Args:
        bundle: the folder.
        repository: the folder of models; made where there is none.
        layout: ``triton`` (Triton Inference Server, whose own backend opens the engine), ``triton-python`` (its Python
            backend, in which deploykit opens the bundle, of any runtime), ``ovms`` (OpenVINO Model Server) or
            ``kserve`` (MLServer, which serves the Open Inference Protocol and which KServe runs).
        name: of the model; None: the backbone's.
        version: its number.

    Raises:
        SpecError: no such layout, a server that does not open engines of this runtime, a name or version that is
            taken, or a repository in a bundle.
        BundleError: the bundle is damaged.
        StorageError: the folder cannot be written.
    """
    check_arguments(write_repository, locals())
    if not 1 <= version <= 1 << 31:
        raise SpecError(f"version is {version}; expected a whole number from 1 to 2147483648.")
    folder, root = Path(bundle), Path(repository).absolute()
    shipment = make_shipment(folder)
    manifest = shipment.manifest
    name = name if name is not None else model_name(manifest.backbone.name)
    if not _NAME.fullmatch(name):
        raise SpecError(f"the name of the model is {name!r}; expected letters, digits, '_', '-' and '.'.")
    check_outside_bundles(root / name)
    backend = backend_of(manifest)
    serving = _serving_of(backend)
    plan = _plan(shipment, serving, check_layout(layout, backend), name, version)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked_folder(root, f"to add the model {name}", seconds=_LOCK_SECONDS):
            _write(plan, folder, root, name)
    except (NotADirectoryError, FileExistsError) as error:
        raise SpecError(f"{root} is not a folder; a model repository is one. Choose another name.") from error
    except OSError as error:
        raise storage_error(f"the model repository {root} cannot be written", error) from error
    return ServedModel(
        bundle=os.fspath(bundle),
        repository=os.fspath(repository),
        layout=layout,
        name=name,
        version=version,
        files=tuple(sorted((*plan.copied, *plan.texts))),
        start=_START[layout].format(repository=root),
        notes=tuple(note for key, note in serving.notes.items() if layout == "triton" and key == manifest.precision),
    )


def model_name(backbone: str) -> str:
    """Return what a backbone's model is called in a repository, unless another name is given."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", backbone).lstrip(".-") or "model"


def check_vacant(repository: Path, backbone: str, layout: Layout) -> None:
    """Refuse a repository in which the first version of a backbone's model is, before it is exported.

    Raises:
        SpecError: it is there.
    """
    folder = repository / model_name(backbone) / _version_folder(layout, 1)
    if os.path.lexists(folder):
        raise SpecError(
            f"{folder} is there already. Give another --repository; or export without --layout, and add the bundle by "
            "deploykit repository with another --version or --name."
        )


def _version_folder(layout: Layout, version: int) -> str:
    return f"v{version}" if layout == "kserve" else str(version)


def check_layout(layout: str, backend: Backend) -> Layout:
    """Return a layout whose server opens engines of a backend.

    Raises:
        SpecError: no such layout, or its server does not.
    """
    if layout not in get_args(Layout):
        raise SpecError(f"layout is {layout!r}. {nearest(str(layout), get_args(Layout))}")
    serving = _serving_of(backend)
    if (layout == "triton" and serving.triton_backend is None) or (layout == "ovms" and serving.model_server is None):
        raise SpecError(
            f"the server of the layout {layout!r} opens no {backend.title} engines by itself. Choose 'triton-python' "
            "or 'kserve', where deploykit opens them, or export the backbone for another runtime."
        )
    return cast("Layout", layout)


def _serving_of(backend: Backend) -> Serving:
    serving: Serving = resolve(backend.serving) if backend.serving is not None else Serving()
    return serving


_START: dict[Layout, str] = {
    "triton": "tritonserver --model-repository={repository}",
    "triton-python": "tritonserver --model-repository={repository}",
    "ovms": f"ovms --config_path {{repository}}/{model_server.CONFIG} --rest_port 8000",
    "kserve": "mlserver start {repository}",
}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The files of a model below its folder.

    ``copied`` maps a name to the file of the bundle, ``texts`` to what is written. ``fixed`` are those that all
    versions share, ``version`` the folder of this one. ``entry`` is the model's own in the repository's configuration.
    """

    copied: dict[str, tuple[str, FileRecord]]
    texts: dict[str, bytes]
    fixed: frozenset[str]
    version: str
    entry: dict[str, object] | None = None


def _plan(shipment: Shipment, serving: Serving, layout: Layout, name: str, version: int) -> _Plan:
    manifest, files, inside = shipment.manifest, shipment.files, _version_folder(layout, version)
    if layout == "kserve":
        copied = {f"{inside}/{open_inference.BUNDLE}/{each}": (each, record) for each, record in files.items()}
        settings = open_inference.model_settings(manifest, name, version)
        texts = {f"{inside}/{open_inference.CONFIG}": settings}
        return _Plan(copied=copied, texts=texts, fixed=frozenset(), version=inside)
    parts = engine_parts(manifest.engine, manifest.files)
    copied = {f"{inside}/{PurePosixPath(part).name}": (part, files[part]) for part in parts}
    described = [MANIFEST, MANIFEST_DIGEST, *([LABELS_FILE] if LABELS_FILE in manifest.files else [])]
    if layout == "ovms":
        entry = model_server.model_server_entry(manifest, serving, name)
        return _Plan(copied=copied, texts={}, fixed=frozenset(), version=inside, entry=entry)
    python = layout == "triton-python"
    config = triton.triton_config(manifest, serving, name, python=python).encode()
    texts = {triton.CONFIG: config}
    if python:
        copied = {f"{inside}/{triton_model.BUNDLE}/{each}": (each, record) for each, record in files.items()}
        texts[f"{inside}/{triton.PYTHON_MODEL}"] = triton_model.MODEL
        described = [LABELS_FILE] if LABELS_FILE in manifest.files else []
    copied |= {(each if each == LABELS_FILE else f"{inside}/{each}"): (each, files[each]) for each in described}
    fixed = frozenset({triton.CONFIG} | ({LABELS_FILE} & copied.keys()))
    return _Plan(copied=copied, texts=texts, fixed=fixed, version=inside)


def _write(plan: _Plan, folder: Path, root: Path, name: str) -> None:
    """Write a model beside its place and rename it, and then its entry in the repository's configuration."""
    target = root / name
    _check_free(plan, folder, target)
    config = model_server.with_entry(root / model_server.CONFIG, plan.entry) if plan.entry is not None else None
    with _staging(root) as staging:
        for file, (source, record) in plan.copied.items():
            _copy(folder / source, staging / "model" / file, record)
        for file, text in plan.texts.items():
            (staging / "model" / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / "model" / file).write_bytes(text)
        if target.exists():
            (staging / "model" / plan.version).rename(target / plan.version)
            added = target / plan.version
        else:
            (staging / "model").rename(target)
            added = target
        if config is not None:
            try:
                (staging / "config").write_bytes(config)
                (staging / "config").replace(root / model_server.CONFIG)
            except OSError:
                shutil.rmtree(added, ignore_errors=True)
                raise


def _check_free(plan: _Plan, folder: Path, target: Path) -> None:
    """Refuse a version that is there, or one of a model with another contract.

    Raises:
        SpecError: it is.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise SpecError(f"{target} is not a model's folder. Give another --name.")
    if os.path.lexists(target / plan.version):
        raise SpecError(f"{target / plan.version} is there already. Give another --version or --name.")
    for file in plan.fixed:
        wanted = plan.texts[file] if file in plan.texts else (folder / file).read_bytes()
        try:
            same = (target / file).read_bytes() == wanted
        except OSError:
            same = False
        if not same:
            raise SpecError(
                f"{target / file} is not what this bundle needs, so that it is no version of that model. "
                "Give another --name."
            )


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """Give a folder beside a repository, where no server looks, and remove what killed processes left there."""
    prefix = f".{root.name}."
    for left in root.parent.glob(f"{prefix}*{_PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)  # the repository is locked, so that its writer has ended
    staging = root.parent / f"{prefix}{secrets.token_hex(4)}{_PARTIAL}"
    staging.mkdir()
    try:
        yield staging
    finally:
        with suppress(OSError):
            shutil.rmtree(staging, ignore_errors=True)


def _copy(source: Path, target: Path, record: FileRecord) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_plain(source, follow=True) as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
    with target.open("rb") as written:
        if digest_of(written) != record.sha256:
            raise BundleError(f"{source} was replaced while it was copied. Fix: try again.")
