"""What a person sees while a run trains.

The bar moves with the step number, which is public. Losses and ε appear only when
:meth:`Progress.committed` says that the parameters they belong to are released.
"""

import math
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar on a terminal, a line for each checkpoint elsewhere.

    Args:
        steps: how many there will be.
        title: stands before the bar.
    """

    def __init__(self, steps: int, title: str = "private"):
        self._console = Console()
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
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=steps, shown="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, done: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=done)

    def committed(self, done: int, validation_loss: float, epsilon: float) -> None:
        """Shows what belongs to the checkpoint that was just committed."""
        spent = "ε = ∞" if math.isinf(epsilon) else f"ε = {epsilon:.2f}"
        shown = f"validation loss {validation_loss:.3f} nats/byte, {spent}"
        self._bar.update(self._task, completed=done, shown=shown)
        if not self._console.is_terminal:
            print(f"{self._title}: step {done}/{self._steps}, {shown}", flush=True)
