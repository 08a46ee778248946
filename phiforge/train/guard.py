"""The two guards of training: stop on a number that is not finite, skip steps that leave the band.

`guard.check(step, loss, grad_norm)` says whether to take the step; its window is part of the
checkpoint, so that a resumed run decides as the undisturbed one. Nothing is written.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

# Fewer values than this make no band; loss and gradients change too fast at the very beginning.
_MIN_HISTORY = 32
# A step is a spike only if it also exceeds the mean by this share, however calm the window was.
_MIN_LOSS_RISE, _MIN_NORM_RISE = 0.1, 1.0


class TrainingError(RuntimeError):
    """Training stopped on purpose; the message names the step and the remedy."""


@dataclass
class Guard:
    """Rolling band of accepted losses and gradient norms (as OLMo's skip-step optimizer).

    A value above mean + sigma x standard deviation of the last `window` accepted ones is a spike.
    `sigma` 0 turns the band off; numbers that are not finite always stop.
    """

    sigma: float
    window: int
    max_skipped: int
    losses: deque[float] = field(default_factory=deque)
    norms: deque[float] = field(default_factory=deque)
    skipped: int = 0
    skipped_in_a_row: int = 0

    def check(self, step: int, loss: float, grad_norm: float, last_checkpoint: str) -> bool:
        """True to take the step, False to skip it.

        Raises TrainingError for NaN or infinity, and after `max_skipped` skips in a row.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: not a finite number. The "
                f"weights were not touched. Last checkpoint: {last_checkpoint}. Lower lr, raise "
                "warmup_steps or set dtype to fp32, then run again; if it stays at this step, look "
                "at its data."
            )
        if self._spike(self.losses, loss, _MIN_LOSS_RISE) or self._spike(
            self.norms, grad_norm, _MIN_NORM_RISE
        ):
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > self.max_skipped:
                raise TrainingError(
                    f"step {step}: {self.skipped_in_a_row} steps in a row left the band of the "
                    f"last {len(self.losses)} (loss {loss:.4g}, gradient norm {grad_norm:.4g}). "
                    f"Last checkpoint: {last_checkpoint}. Training diverged: lower lr; or raise "
                    "spike_sigma (0 = off) if these steps are fine."
                )
            return False
        self.skipped_in_a_row = 0
        for values, value in ((self.losses, loss), (self.norms, grad_norm)):
            values.append(value)
            if len(values) > self.window:
                values.popleft()
        return True

    def _spike(self, values: deque[float], value: float, min_rise: float) -> bool:
        if not self.sigma or len(values) < min(_MIN_HISTORY, self.window):
            return False
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        return value > mean + max(self.sigma * deviation, min_rise * abs(mean))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values (floats survive JSON exactly)."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        self.losses, self.norms = deque(state["losses"]), deque(state["norms"])
        self.skipped = state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
