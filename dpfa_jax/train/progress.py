"""What a person sees while a run trains, and how they stop it.

The bar moves with the step number, which is public. Losses and ε appear only when
:meth:`Progress.committed` says that the parameters they belong to are released.
"""

import math
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar on a terminal, a line for each checkpoint elsewhere.

    Ctrl-C raises KeyboardInterrupt at once, as ever. Where that falls into a callback that
    swallows it (JAX has one in Python's garbage collector), the next :meth:`step` raises it again.

    Args:
        steps: how many there will be.
        title: stands before the bar.
        quiet: shows nothing: one of several processes speaks.
    """

    def __init__(self, steps: int, title: str = "private", *, quiet: bool = False):
        self._console = Console(quiet=quiet)
        self._quiet = quiet
        self._steps = steps
        self._title = title
        self._shown = ""
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=steps, shown="")

    def __enter__(self) -> "Progress":
        self._interrupted = False
        self._handler: Any = None
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        self._bar.start()
        return self

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.default_int_handler(number, frame)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        self._bar.stop()

    def step(self, done: int) -> None:
        """Moves the bar.

        Raises:
            KeyboardInterrupt: if one was swallowed.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        self._bar.update(self._task, completed=done)

    def committed(self, done: int, validation_loss: float, epsilon: float) -> None:
        """Shows what belongs to the checkpoint that was just committed."""
        spent = "ε = ∞" if math.isinf(epsilon) else f"ε = {epsilon:.2f}"
        shown = f"validation loss {validation_loss:.3f} nats/byte, {spent}"
        self._bar.update(self._task, completed=done, shown=shown)
        if not self._console.is_terminal and not self._quiet:
            print(f"{self._title}: step {done}/{self._steps}, {shown}", flush=True)
