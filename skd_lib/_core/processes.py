"""Child processes that end with the process that has started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def ends_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """Return what a child calls before it becomes another program, so that its parent's death sends it a signal.

    The C library is loaded here, in the parent: between fork and exec as little as possible may happen. None where it
    does not work: on other systems than Linux, and in a thread, whose end the kernel takes for the parent's death.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent may ignore it
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask
