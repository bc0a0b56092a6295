"""The configuration of OpenVINO Model Server: ``config.json``, with an entry for each model of a folder.

https://docs.openvino.ai/2025/model-server/ovms_docs_parameters.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from deploykit.backends.backend import Serving, resolve
from deploykit.errors import SpecError
from deploykit.manifest import Manifest
from deploykit.plain_files import NotPlainFile, read_plain

CONFIG = "config.json"
_MOST_BYTES = 4 << 20


def model_server_entry(manifest: Manifest, serving: Serving, name: str) -> dict[str, Any]:
    """Return what the configuration says of a model, whose folder is named relative to it."""
    return {"name": name, "base_path": name, "plugin_config": resolve(str(serving.model_server))(manifest)}


def with_entry(path: Path, entry: dict[str, Any]) -> bytes:
    """Return a configuration, which may be there already, with one model's entry in it.

    Raises:
        SpecError: what is there is no configuration.
    """
    try:
        raw = msgspec.json.decode(read_plain(path, _MOST_BYTES))
        known = list(raw["model_config_list"])
        kept = [each for each in known if each["config"]["name"] != entry["name"]]
    except FileNotFoundError:
        raw, kept = {}, []
    except (NotPlainFile, ValueError, msgspec.MsgspecError, KeyError, TypeError) as error:
        raise SpecError(
            f"{path} is not the configuration of a model server ({error!r:.80}). Choose another folder."
        ) from error
    raw["model_config_list"] = [*kept, {"config": entry}]
    return msgspec.json.format(msgspec.json.encode(raw), indent=2) + b"\n"
