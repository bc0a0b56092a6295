"""Keep torch's own talk about an export off the user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_TALKATIVE = ("torch", "torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Silence progress lines, dumps of graphs, deprecations and warnings; an error that is raised says it all."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
