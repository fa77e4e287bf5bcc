"""SIGTERM, SIGUSR1 and Ctrl-C: every process stops after the same step, without synchronising to find out."""

import signal

import torch
import torch.distributed as dist

from runtime.processes import cpu_group

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Remembers a signal and agrees on it with the other processes one step later.

    The flag travels on the CPU, so that the wait is for a message sent a whole step ago.
    A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._group = cpu_group()
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def poll(self) -> bool:
        """Whether to stop now; the same answer on every process, which all call it equally often."""
        if self._group is None:
            return self.received is not None
        stop = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            if number := int(flag.item()):
                self.received, stop = number, True
        flag = torch.tensor([self.received or 0])
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        return stop

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
