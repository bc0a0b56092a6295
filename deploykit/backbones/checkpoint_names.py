"""What checkpoint files are called; torch is not needed to tell."""

from __future__ import annotations

from pathlib import Path

SAFETENSORS = ".safetensors"
INDEX = ".index.json"
SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin", ".ckpt", ".tar", INDEX)
"""What a checkpoint file ends with; all but safetensors are read with ``torch.load(weights_only=True)``."""

IN_FOLDERS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""The checkpoint of a folder that was written for the model hub, the first that is there."""


def is_checkpoint_name(name: str) -> bool:
    """Return whether a file's name ends as a checkpoint's does."""
    return name.lower().endswith(SUFFIXES)


def checkpoint_in(folder: Path) -> Path | None:
    """Return the checkpoint in a folder of the model hub's layout; None where there is none."""
    return next((folder / name for name in IN_FOLDERS if (folder / name).is_file()), None)
