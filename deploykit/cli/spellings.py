"""What a message calls an option of the Python interface, and what the command calls it."""

from __future__ import annotations

_SPELLINGS = {
    "calibration=FOLDER": "--calibration FOLDER",
    "skip_corrupt=True": "--skip-corrupt",
    "leave require_speedup out": "leave out --require-speedup",
    "overwrite=True": "--overwrite",
    "pretrained=<file>": "--weights FILE",
    "batch_size='dynamic'": "--batch-size dynamic",
    "image_size=(min, opt, max)": "--image-size MIN,OPT,MAX",
    "device='cpu'": "--device cpu",
    "leave ray out": "leave out --ray",
    "ray=True": "--ray",
    "trust=True": "--trust",
    "new_head=True": "--new-head",
    "leave num_classes out": "leave out --num-classes",
    "leave in_channels out": "leave out --in-channels",
    "num_classes=": "--num-classes ",
    "in_channels=": "--in-channels ",
    "checkpoint_key=": "--checkpoint-key ",
    "with checkpoint_key": "with --checkpoint-key",
    "preprocessing=": "--mean, --std, --interpolation, --crop-pct and --crop-mode",
}


def as_options(message: str) -> str:
    """Say a message about options of the Python interface in the command's words."""
    for spelling, option in _SPELLINGS.items():
        message = message.replace(spelling, option)
    return message
