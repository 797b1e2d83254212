"""Hidden states of scored sequences, kept until the update wants their distributions.

Which are kept is a function of what was scored last alone, so a resumed step keeps what the step would have kept.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor


class KeptHidden:
    """A store of limited size; what was put first goes first. One sequence is one entry, however often it is put.

    Args:
        max_bytes: of all tensors together; an entry that is larger by itself is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._of: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._of)

    def put(self, sequence: Sequence[int], hidden: Tensor) -> None:
        """Keep [n, H], which predict the last n tokens of ``sequence``; copied to the host."""
        key = _key(sequence)
        self._drop(key)
        size = hidden.numel() * hidden.element_size()
        if not size or size > self.max_bytes:
            return
        while self.bytes + size > self.max_bytes:
            self._drop(next(iter(self._of)))
        self._of[key] = hidden.detach().cpu().clone()
        self.bytes += size

    def get(self, sequence: Sequence[int]) -> Tensor | None:
        """What was put, on the host."""
        return self._of.get(_key(sequence))

    def _drop(self, key: bytes) -> None:
        gone = self._of.pop(key, None)
        if gone is not None:
            self.bytes -= gone.numel() * gone.element_size()


def _key(sequence: Sequence[int]) -> bytes:
    return array("q", sequence).tobytes()
