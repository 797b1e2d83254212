"""What can go wrong with a request to a server, sorted by what to do about it.

``Fault``: this try failed; another may not (another endpoint, later). ``Refused``: every try would fail, because a
setting is wrong; the run ends. ``RowRefused``: the server is well, this one request is beyond it. ``Unanswered``: no
usable answer came before the deadline.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from scope_opd.errors import ConfigError

RETRIED_STATUS = frozenset({408, 425, 429})
"""Besides all of 5xx: statuses that say "not now"."""


class Fault(Exception):
    """One try failed.

    Args:
        kind: a short word for counting ("connection", "timeout", "status 503", "answer").
        message: what happened, without any key in it.
        retry_after_s: how long the server asks to be left alone.
    """

    def __init__(self, kind: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.retry_after_s = kind, message, retry_after_s

    @property
    def broke_connection(self) -> bool:
        """Whether somebody else may answer at this address from now on (a restart)."""
        return self.kind == "connection"


class BadAnswer(Fault):
    """The server answered 200 with something that is not the answer to the question."""

    def __init__(self, message: str) -> None:
        super().__init__("answer", message)


class Refused(ConfigError):
    """400, 401, 403 or 404, or a redirect: a setting is wrong. One line that names endpoint and setting."""


class RowRefused(Exception):
    """A 400 for one request on a server that is well.

    Attributes:
        foreign_token: the server says that a token is beyond its vocabulary.
    """

    def __init__(self, message: str, *, foreign_token: bool = False) -> None:
        super().__init__(message)
        self.foreign_token = foreign_token


class Clipped(Exception):
    """A response ended for its length before the length that was asked for: the server's context is too short.

    Attributes:
        tokens: how many there were.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(f"cut at {tokens} tokens")
        self.tokens = tokens


class ForeignToken(Exception):
    """A server drew an id that the student has no row for."""

    def __init__(self, token_id: int) -> None:
        super().__init__(f"id {token_id}")
        self.token_id = token_id


class Unanswered(Exception):
    """No usable answer before the deadline.

    Attributes:
        tries: requests sent.
        faults: kind -> how often.
    """

    def __init__(self, tries: int, faults: Counter[str], last: str) -> None:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in faults.most_common()) or "no endpoint was usable"
        super().__init__(f"no answer in {tries} tries ({kinds}); the last: {last}")
        self.tries, self.faults = tries, faults


def retry_after_s(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for: a number of seconds or an HTTP date; None where it is neither.

    Args:
        value: the header.
        now: the present, for dates; None: the clock's.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(min(int(text[:9]), 10**8))
    try:
        when = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())
