"""Servers that sample the student: one client thread, one pool, and the proof that each holds the current weights.

A server is used only once it has shown that it holds the weights of the ``Target``: its tag is the target's, and its
log-probs of a fixed text are the trainer's. One that restarted serves the weights it was started with: it is brought
to the target first, and what it was sampling meanwhile does not count.

Not covered: drawing samples (``served``), how weights get to a server (``weight_sync``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from scope_opd.serving.pool import Endpoint


@dataclass(frozen=True, slots=True)
class Target:
    """The weights that every server shall hold; set by the weight sync, all of it runs in the samplers' loop.

    Attributes:
        version: optimiser steps behind them.
        tag: unique in this run's life, what GET /weight_info must answer.
        load: brings one endpoint there; raises a ``Fault`` where it failed.
        probe: mean absolute difference of an endpoint's log-probs of a fixed text from the trainer's, nats a token.
        tolerance: the most that ``probe`` may find.
    """

    version: int
    tag: str
    load: Callable[[Endpoint], Awaitable[None]]
    probe: Callable[[Endpoint], Awaitable[float]]
    tolerance: float
