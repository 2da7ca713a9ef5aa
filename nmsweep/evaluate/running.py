"""How lm-eval is run: quietly, in this process, with each template compiled once."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from functools import cache

import datasets
import lm_eval.utils


@contextlib.contextmanager
def running_lm_eval() -> Iterator[None]:
    """Run lm-eval's evaluator inside the block; it forks no pool, which a process that uses a GPU must not do."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with quiet(), _templates_compiled_once():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and progress bars of lm-eval and datasets; a cell has its own display."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            yield
    except BaseException:
        logging.getLogger(__name__).info("%s", stderr.getvalue())
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """Keep compiled Jinja templates: lm-eval compiles a task's templates anew for every item (5 s for HellaSwag's 10,042)."""
    environment = lm_eval.utils.env
    environment.from_string = cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string
