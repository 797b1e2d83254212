"""Short ways to a teacher behind servers, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_server import MODEL
from scope_opd.addresses import parse_base_url
from scope_opd.serving.pool import PoolSettings
from scope_opd.serving.route import ClientSettings, RouteSettings
from scope_opd.serving.secrets import Secret
from scope_opd.teacher.ledger import Ledger
from scope_opd.teacher.pool import PoolTeacher
from scope_opd.teacher.servers import Servers

FINGERPRINT = (5, 6, 7, 8, 9, 10, 11, 12)
QUICK: dict[str, Any] = {
    "deadline_s": 20.0,
    "backoff_s": 0.002,
    "backoff_max_s": 0.05,
    "down_s": 0.01,
    "down_max_s": 0.1,
}


def route(*urls: str, key: str | None = None, model: str = MODEL) -> RouteSettings:
    return RouteSettings(tuple(parse_base_url(url) for url in urls), model, None if key is None else Secret(key))


@contextmanager
def teacher_of(
    *urls: str,
    key: str | None = None,
    model: str = MODEL,
    routes: dict[str, RouteSettings] | None = None,
    pool: dict[str, Any] | None = None,
    client: dict[str, Any] | None = None,
    ledger: Path | None = None,
    fingerprint: Sequence[int] = FINGERPRINT,
    references: dict[tuple[str, str], list[float]] | None = None,
    top_k: int = 0,
    **options: Any,
) -> Iterator[PoolTeacher]:
    """An open teacher; closed at the end, whatever happens."""
    servers = Servers(
        routes or {"": route(*urls, key=key, model=model)},
        fingerprint,
        client=ClientSettings(**{"connect_timeout_s": 2.0, "read_timeout_s": 2.0, "start_s": 3.0, **(client or {})}),
        pool=PoolSettings(**{**QUICK, **(pool or {})}),
        ledger=Ledger(ledger),
        references=references,
        top_k=top_k,
    )
    teacher = PoolTeacher(servers, **options)
    try:
        servers.open()
        yield teacher
    finally:
        teacher.close()
