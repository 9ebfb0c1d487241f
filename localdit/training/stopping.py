"""Being asked to stop: SIGTERM (a scheduler that takes the machine back) or Ctrl-C end a run at a safe point.

The first signal is remembered, and the work asks between two of its steps. A second one ends the process at
once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this module, and should not wait for PyTorch
    from accelerate import Accelerator

EXIT_CODE = 143  # what a shell says of a process that SIGTERM ended: 128 + 15


class Stopped(Exception):
    """The run was asked to stop and did, with all its work saved; the message says how to go on."""


class StopRequest:
    """Whether some process of the run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def anywhere(self, accelerator: "Accelerator") -> bool:
        """Whether any process was asked. All must call it at the same point, and all get the same answer."""
        if accelerator.num_processes == 1:
            return bool(self)
        import torch

        asked = torch.tensor(float(bool(self)), device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum") > 0)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen to SIGTERM and SIGINT. Outside the main thread nothing is heard."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {each: signal.signal(each, request._remember) for each in _SIGNALS}
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
