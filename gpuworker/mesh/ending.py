"""How a worker's process ends: the status that its supervisor reads, and one line that says why.

What the world did (a refused name, a broken device, a model that is not there) is one line;
anything else is a bug, with its traceback. Statuses are in naming.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from gpuworker.mesh.naming import EXIT_CONFIG, EXIT_FAILED, EXIT_REFUSED, NameRefused
from hocket.errors import HocketError, WrongConfig


def ended_with(
    worker: str, serve: Callable[[], None], wrong: tuple[type[Exception], ...] = ()
) -> int:
    """Runs `serve`; returns the status, having said on stderr what went wrong.

    `wrong`: errors that another start would meet again, as those of settings.
    """
    try:
        serve()
    except KeyboardInterrupt:
        return 0
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, (HocketError, *wrong)):
            print(f"worker {worker}: {cause}", file=sys.stderr, flush=True)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(cause, NameRefused):
            return EXIT_REFUSED
        return EXIT_CONFIG if isinstance(cause, (WrongConfig, *wrong)) else EXIT_FAILED
    return 0


def _cause(error: BaseException) -> BaseException:
    """What ended a task group first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
