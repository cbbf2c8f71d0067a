"""Functions that may end the process that calls them."""

from __future__ import annotations

import faulthandler
import os
import resource
import traceback
from collections.abc import Callable


def exit_code(function: Callable[[], object]) -> int:
    """How a child process ends that calls a function: 0, a code, or less a signal's number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            function()
            code = 0
        except SystemExit as ended:
            print(ended.code, flush=True)
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
