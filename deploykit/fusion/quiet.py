"""Keep other libraries' own talk about an export off the user's terminal."""

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
    with (
        quiet_loggers(*_TALKATIVE),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Let these loggers pass on errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
