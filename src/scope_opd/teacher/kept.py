"""Hidden states of scored sequences, kept until the update wants their distributions.

Which are kept is a function of what was put since the last ``clear`` alone, so that a resumed step finds what the step
would have found: states computed in another batch differ in their last bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor


class KeptHidden:
    """A store of limited size: what is put when it is full is not kept.

    Args:
        max_bytes: of all tensors together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._of: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._of)

    def clear(self) -> None:
        """Let go of all."""
        self._of.clear()
        self.bytes = 0

    def put(self, sequence: Sequence[int], hidden: Tensor) -> None:
        """Keep [n, H], which predict the last n tokens of ``sequence``, on the host; of two puts the one of more."""
        key, size = array("q", sequence).tobytes(), hidden.numel() * hidden.element_size()
        old = self._of.get(key)
        if old is not None and len(old) >= len(hidden):
            return
        free = self.max_bytes - self.bytes + (0 if old is None else old.numel() * old.element_size())
        if not 0 < size <= free:
            return
        # A view would keep the batch that it is of.
        self._of[key] = hidden.detach().clone() if hidden.is_cpu else hidden.detach().cpu()
        self.bytes = self.max_bytes - free + size

    def get(self, sequence: Sequence[int]) -> Tensor | None:
        """What was kept, on the host."""
        return self._of.get(array("q", sequence).tobytes())
