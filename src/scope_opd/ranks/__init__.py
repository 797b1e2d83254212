"""Processes that train one student together, and how the first of them has all do something.

Rank 0 leads: it alone reads data, drives rollouts and judging, asks servers, and writes the run folder. Every other
rank ``follow``s: it waits for rank 0 to name a job, does its share, and answers. A job is a function registered under
the same name on every rank; inside it all ranks may use torch's collectives. A world of one calls the function.

All ranks end together. A rank that fails says so to rank 0, which tells the others; one that is killed is missed at
once, because its connection closes. Rank 0 then gets ``RankLost`` wherever it is, closes what it has open and ends with
that line; a follower that is stuck in a collective ends on the spot, for it holds nothing. Signals are rank 0's to
heed: a follower passes over the first one.

Jobs travel over a connection of each follower to rank 0 (``wires``), not over a collective: generation may last hours,
and a collective has a time limit. In ``bond`` is how ranks hear one another and end, in ``jobs`` what they do together.
Not covered: what the jobs are, starting the processes (torchrun, Ray).
"""

from __future__ import annotations

from scope_opd.ranks.bond import RankLost, Work
from scope_opd.ranks.jobs import POLL_S, Ranks

__all__ = ["POLL_S", "RankLost", "Ranks", "Work"]
