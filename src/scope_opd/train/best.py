"""Which evaluation was the best so far, by ``run.keep_best``; its checkpoint is kept besides the newest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from scope_opd.tracking.base import numbers


class Best:
    """The best evaluation.

    Args:
        figure: as ``Config.best_figure``; None: none is looked for.

    Attributes:
        found: ``{"step", "figure", "value"}`` of the best so far; None before the first. The earlier of two equal ones.
    """

    def __init__(self, figure: tuple[float, str] | None) -> None:
        self._figure = figure
        self._name = "" if figure is None else f"T{figure[0]:g}/{figure[1]}"
        self.found: dict[str, Any] | None = None

    def look(self, step: int, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the evaluation of a step, one row a temperature, is better than all before it."""
        if self._figure is None:
            return False
        temperature, name = self._figure
        values = [numbers(row).get(name) for row in rows if row.get("temperature") == temperature]
        if not values or values[0] is None or (self.found is not None and values[0] <= self.found["value"]):
            return False
        self.found = {"step": step, "figure": self._name, "value": values[0]}
        return True

    def restore(self, found: dict[str, Any] | None, steps: Collection[int]) -> None:
        """Go on from an earlier sitting's ``found``, if it went by this figure and is among ``steps``."""
        same = found is not None and self._figure is not None and found["figure"] == self._name
        self.found = found if same and found is not None and found["step"] in steps else None

    @property
    def kept(self) -> set[int]:
        """The step whose checkpoint is to be kept."""
        return set() if self.found is None else {self.found["step"]}
