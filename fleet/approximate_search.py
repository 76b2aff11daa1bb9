"""Finds what an approximate update may keep within a budget of bytes, by measuring real deltas.

In order: (1) values left as they are and each way of rounding are measured at one amount, the latter only
where the former are not far smaller, (2) from that it is estimated how much each could keep within the
budget, and how much of the change that would explain, (3) the amount is closed in on with the best of them,
(4) of all that was measured and fits, what explains most is taken.

Pure: deltas are made by the function that is given. Rule: at most about MAX_TRIES + len(ROUNDINGS) deltas a
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sluice.api.v1 import errors_pb2
from updater.approximate import EXACT, ROUNDINGS, Rounding, Tally
from updater.errors import SluiceError

MAX_TRIES = 8  # deltas made to close in on the amount, with one way of rounding
CLOSE = 0.97  # of the budget used is close enough
_AS_SMALL = 1.02  # values left where they are nearest are preferred while this much larger ...
_MUCH_SMALLER = 0.8  # ... and without further trials when this much smaller


@dataclass(frozen=True)
class Trial:
    """One approximate target that was built and diffed.

    Attributes:
        amount: of the method's units that were kept.
        rounding: of its values.
        delta_size: bytes of its exact delta against the base.
        tally: of its layers; it has no layers when nothing was kept of any.
        cosine: least cosine of its golden outputs; None if there is no golden file.
        layer_bytes: of the delta, for each layer.
    """

    amount: int
    rounding: Rounding
    delta_size: int
    tally: Tally
    cosine: float | None = None
    layer_bytes: tuple[int, ...] = ()


@dataclass
class Search:
    """A search for the amount.

    Args:
        most: the largest amount.
        guess: the amount to begin with.
        budget: bytes.
        attempt: builds and measures one approximate target.
        foresee: what share of the change an amount would explain; makes no delta.
        roundings: that differ for this model, EXACT among them.
    """

    most: int
    guess: int
    budget: int
    attempt: Callable[[int, Rounding], Trial]
    foresee: Callable[[int, Rounding], float]
    roundings: Sequence[Rounding] = ROUNDINGS
    trials: list[Trial] = field(default_factory=list)

    def run(self) -> Trial:
        """The best that fits the budget; all that was tried is in `trials`.

        Raises:
            SluiceError: LIMIT_EXCEEDED if nothing that fits is better than no update.
        """
        floor = self._try(0, EXACT)
        if floor.delta_size > self.budget:
            raise _out_of_reach(
                self.budget,
                f"what is not approximated (biases, norms, scales, the file's structure) takes "
                f"{floor.delta_size} bytes alone",
                floor.delta_size,
            )
        for first in self._in_order(floor.delta_size):
            self._close_in(floor, first)
            best = self.best()
            if best is not None:
                return best
        least = min(trial.delta_size for trial in self.trials if trial.amount)
        raise _out_of_reach(
            self.budget, f"the least that was tried and keeps anything takes {least} bytes", least
        )

    def best(self) -> Trial | None:
        """Of what fits and is better than no update, that which explains most; of equals the smallest."""
        fits = [
            trial
            for trial in self.trials
            if trial.amount and trial.delta_size <= self.budget and trial.tally.explained > 0
        ]
        return max(fits, key=lambda trial: (trial.tally.explained, -trial.delta_size), default=None)

    def _try(self, amount: int, rounding: Rounding) -> Trial:
        for trial in self.trials:
            if (trial.amount, trial.rounding) == (amount, rounding):
                return trial
        trial = self.attempt(amount, rounding)
        self.trials.append(trial)
        return trial

    def _in_order(self, floor: int) -> list[Trial]:
        """A trial for each way of rounding, that which promises most within the budget first."""
        trials = [self._try(self.guess, rounding) for rounding in self._roundings()]
        foreseen = {
            trial.rounding: self.foresee(self._expected(trial, floor), trial.rounding) for trial in trials
        }
        return sorted(trials, key=lambda trial: -foreseen[trial.rounding])

    def _roundings(self) -> Sequence[Rounding]:
        """EXACT if it codes about as small as any, else the ways whose offsets suit the codec best."""
        rounded = [rounding for rounding in self.roundings if rounding.bits is not None]
        if not rounded:
            return [EXACT]
        finest = max(rounding.bits or 0 for rounding in rounded)
        exact = self._try(self.guess, EXACT)
        found = []
        for rounding in rounded:
            if rounding.bits == finest:
                found.append(self._try(self.guess, rounding))
                # Codes that the delta sends as such are far smaller than any words, whatever the offsets.
                if exact.delta_size <= _MUCH_SMALLER * found[0].delta_size:
                    return [EXACT]
        suits = min(found, key=lambda trial: trial.delta_size).rounding
        if exact.delta_size <= _AS_SMALL * min(trial.delta_size for trial in found):
            return [EXACT]
        same = [rounding for rounding in rounded if (rounding.up, rounding.down) == (suits.up, suits.down)]
        return [EXACT, *same]

    def _expected(self, trial: Trial, floor: int) -> int:
        """The amount that should fit, if bytes grow with it in proportion."""
        share = (self.budget - floor) / max(1, trial.delta_size - floor)
        return min(self.most, max(1, math.floor(trial.amount * share)))

    def _close_in(self, floor: Trial, first: Trial) -> None:
        """Interpolates between the largest amount that fits and the least that does not."""
        low, high = floor, None
        if first.delta_size <= self.budget:
            low = first
        else:
            high = first
        amount = self._expected(first, floor.delta_size)
        for _ in range(MAX_TRIES):
            above = high.amount if high is not None else self.most + 1
            if low.amount >= above - 1 or (low.amount and low.delta_size >= CLOSE * self.budget):
                return
            trial = self._try(min(above - 1, max(low.amount + 1, amount)), first.rounding)
            if trial.delta_size <= self.budget:
                low = trial
            else:
                high = trial
            amount = self._expected(low, floor.delta_size) if high is None else self._between(low, high)

    def _between(self, low: Trial, high: Trial) -> int:
        # A little below the budget, so that the answer is more often on the side that fits.
        wanted = self.budget * (1 + CLOSE) / 2
        share = (wanted - low.delta_size) / max(1, high.delta_size - low.delta_size)
        # Sizes need not grow evenly: never creep along one side.
        share = min(0.9, max(0.1, share))
        return low.amount + math.floor((high.amount - low.amount) * share)


def _out_of_reach(budget: int, why: str, needed: int) -> SluiceError:
    return SluiceError(
        errors_pb2.LIMIT_EXCEEDED,
        f"no approximate update fits {budget} bytes: {why}",
        hint=f"give a budget well over {needed} bytes, or another --method",
    )
