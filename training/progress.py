"""Progress bars with time left, on stderr in a terminal and as a widget in a notebook."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pipeline.runs import interrupt

T = TypeVar("T")
_EVERY_SECONDS = 10.0


def progress_callback(log: logging.Logger) -> Any:
    """A Trainer callback that logs step, loss and the time left every few seconds, for logs and batch runs."""
    from transformers import TrainerCallback

    class ProgressLog(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Says how far training is."""

        begun, first, said = 0.0, 0, 0.0
        loss: float | None = None  # evaluating before training logs too

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Start the clock, which a resumed training starts in the middle."""
            self.begun, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            """Remember the newest training loss."""
            self.loss = (logs or {}).get("loss", self.loss)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Log one line, now and then; when the user has asked to stop, save a checkpoint and end."""
            if interrupt.asked() and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True
            now = time.monotonic()
            if now - self.said < _EVERY_SECONDS and state.global_step < state.max_steps:
                return
            self.said = now
            left = (now - self.begun) / (state.global_step - self.first) * (state.max_steps - state.global_step)
            shown = "" if self.loss is None else f", loss {float(self.loss):.3f}"
            log.info("finetune: step %d of %d%s, %.0f s left", state.global_step, state.max_steps, shown, left)

    return ProgressLog()


def track(items: Iterable[T], label: str, *, shown: bool = True) -> Iterator[T]:
    """Yield the items while a bar shows how many are done and how long the rest will take."""
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=label, disable=not (shown and logging.getLogger().isEnabledFor(logging.INFO)), leave=True)
