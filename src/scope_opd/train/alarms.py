"""Alarms: what a run looks like when it is going wrong, judged from its metrics alone.

Each is ``off``, ``warn`` (once when its condition begins, again only after it has ended) or ``stop`` (at every step on
which its condition holds). The state is a small JSON object kept in the checkpoint, so a resumed run rings as an
uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from scope_opd.config import AlarmAction, AlarmsConfig

BASELINE_STEPS = 5


@dataclass(frozen=True, slots=True)
class Alarm:
    """One alarm that rings: its name in ``[run.alarms]``, "warn" or "stop", and one line for the user."""

    name: str
    action: AlarmAction
    message: str


class Alarms:
    """Judges one row of metrics after another.

    Args:
        config: actions and limits.
        weights_use_tau: the paths ("student", "teacher") with perplexity weights; ``uniform_weights`` is silent on
            the others.
    """

    def __init__(self, config: AlarmsConfig, *, weights_use_tau: Collection[str]) -> None:
        self.config = config
        self.weights_use_tau = weights_use_tau
        self._entropies: list[float] = []
        self._first_lengths: list[float] = []
        self._first_norms: list[float] = []
        self._ringing: set[str] = set()

    def state(self) -> dict[str, Any]:
        return {
            "entropies": self._entropies,
            "lengths": self._first_lengths,
            "norms": self._first_norms,
            "ringing": sorted(self._ringing),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._entropies, self._first_lengths = list(state["entropies"]), list(state["lengths"])
        self._first_norms, self._ringing = list(state["norms"]), set(state["ringing"])

    def check(self, metrics: Mapping[str, Any], *, broken: str = "loss or gradient is not finite") -> list[Alarm]:
        """The alarms that ring on this row of metrics, in a fixed order; ``broken`` says what is not finite, if so."""
        rings = []
        for key, message in self._conditions(metrics, broken):
            name = key.partition("/")[0]
            action: AlarmAction = getattr(self.config, name)
            begins = message is not None and key not in self._ringing
            if message is not None:
                self._ringing.add(key)
            elif name != "uniform_weights":  # that one is said once a run
                self._ringing.discard(key)
            if message is not None and (begins or (action == "stop" and name != "uniform_weights")) and action != "off":
                rings.append(Alarm(name, action, message))
        return rings

    def _conditions(self, row: Mapping[str, Any], broken: str) -> Iterator[tuple[str, str | None]]:
        """(key, message) of every alarm that could be judged; message None where all is well."""
        config = self.config
        yield "nan", f"{broken}; the update was left out" if row.get("update/not_finite", 0) > 0 else None

        entropy = row.get("entropy")
        if entropy is not None:
            before = self._entropies[0] if self._entropies else None
            halved = before is not None and entropy < 0.5 * before
            span = len(self._entropies)
            yield (
                "entropy_halved",
                f"entropy fell from {before:.3f} to {entropy:.3f} in {span} steps" if halved else None,
            )
            self._entropies = [*self._entropies, entropy][-config.entropy_window :]

        truncated = row.get("truncated/share")
        if truncated is not None:
            over = truncated > config.truncation_share
            yield (
                "truncation",
                f"{truncated:.0%} of the rollouts have no end token (limit {config.truncation_share:.0%}); "
                "rollout.max_tokens may be too low" if over else None,
            )  # fmt: skip

        length = row.get("length/mean")
        if length is not None:
            if len(self._first_lengths) < BASELINE_STEPS:
                self._first_lengths = [*self._first_lengths, length]
            start = sum(self._first_lengths) / len(self._first_lengths)
            grown = length > config.length_growth_ratio * start
            yield (
                "length_growth",
                f"mean length {length:.1f} is more than {config.length_growth_ratio:g} times that of the first steps "
                f"({start:.1f})" if grown else None,
            )  # fmt: skip

        norm = row.get("grad_norm")
        if norm is not None and norm > 0:
            # The size of a healthy gradient depends on the aggregation (a sum over tokens or a mean): compare it with
            # the run's own first steps, never with a constant.
            if len(self._first_norms) < BASELINE_STEPS:
                self._first_norms = [*self._first_norms, norm]
            start = median(self._first_norms)
            large = norm > config.grad_norm_ratio * start
            yield (
                "grad_norm",
                f"gradient norm {norm:.3g} is more than {config.grad_norm_ratio:g} times that of the first steps "
                f"({start:.3g})" if large else None,
            )  # fmt: skip

        for path in ("student", "teacher"):
            size = row.get(f"ess/{path}")
            if size is not None and path in self.weights_use_tau:
                uniform = size > config.uniform_ess
                yield (
                    f"uniform_weights/{path}",
                    f"{path} weights are uniform (effective sample size {size:.4f}): tau does nothing here"
                    if uniform else None,
                )  # fmt: skip
