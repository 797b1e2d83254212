"""From ``[teacher]`` to teachers behind servers: which settings reach what, and the checks that need no model.

Not covered: what a server does (``serving``, ``teacher.pool``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from scope_opd.addresses import parse_base_url
from scope_opd.config import Config, ServerConfig
from scope_opd.data.rows import pick
from scope_opd.errors import ConfigError, DataError
from scope_opd.serving.pool import Names, PoolSettings
from scope_opd.serving.route import ClientSettings, RouteSettings
from scope_opd.serving.secrets import load_secret
from scope_opd.teacher.ends import EndTokens
from scope_opd.teacher.ledger import Ledger, first_fingerprints
from scope_opd.teacher.pool import PoolTeacher
from scope_opd.teacher.sampling import ServerSampler
from scope_opd.teacher.servers import Servers
from scope_opd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIXED_TEXT = "Let x be a number with 3 x + 12 = 48. So 3 x = 36 and x = 12. Check: 3 * 12 + 12 = 48. The answer: 12."
"""What fingerprints are taken of, in the student's tokens."""


def check_temperature(config: Config, temperature: float) -> None:
    """Servers give log-probs at one temperature, that of the copy they serve.

    Args:
        config: with ``teacher.served``.
        temperature: what the objective divides the teacher's logits by.

    Raises:
        ConfigError: they differ.
    """
    served = config.teacher.served_temperature
    if served != temperature:
        raise ConfigError(
            f"objective.temperature = {config.objective.temperature!r} needs teacher log-probs at temperature "
            f"{temperature:g}, and the servers give them at teacher.served_temperature = {served:g}",
            "the same",
            f"serve a copy of the teacher whose logits are divided by {temperature:g} and set "
            f"teacher.served_temperature = {temperature:g}, sample at rollout.temperature = {served:g}, or take the "
            "teacher as it is (objective.temperature = 'released')",
        )


def open_servers(config: Config, tokenizer: PreTrainedTokenizerBase) -> Servers:
    """A client for the servers of ``[teacher]``, which has met none of them yet. The caller closes it.

    Args:
        config: with ``teacher.served``.
        tokenizer: the student's.

    Raises:
        ConfigError: a key or the certificates cannot be read.
        RunFailed: the run folder's ledger cannot be read.
    """
    teacher = config.teacher
    ledger = Path(config.run.dir) / "teacher.jsonl"
    return Servers(
        {name: _route(teacher.model, name, table) for name, table in _tables(config).items()},
        fixed_tokens(tokenizer),
        client=ClientSettings(
            connect_timeout_s=teacher.connect_timeout_s,
            read_timeout_s=teacher.read_timeout_s,
            ca_bundle=teacher.ca_bundle,
            allow_unprotected=teacher.allow_unprotected_routes,
        ),
        pool=PoolSettings(deadline_s=teacher.deadline_s, max_concurrency=teacher.max_concurrency),
        tolerance=teacher.fingerprint_tolerance,
        ledger=Ledger(ledger),
        references=first_fingerprints(ledger),
        top_k=likeliest_tokens(config, tokenizer),
    )


def likeliest_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of a teacher's likeliest tokens to ask for in each place: more than there are would end a server."""
    return min(config.objective.teacher_topk, len(tokenizer))


def fixed_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The fixed text as token ids; counted up where a tokenizer makes nothing of it."""
    ids = [int(index) for index in tokenizer(FIXED_TEXT, add_special_tokens=False)["input_ids"]]
    return ids if len(ids) >= 2 else list(range(min(8, len(tokenizer))))


def router(config: Config) -> Callable[[Prompt], str] | None:
    """A prompt's route, by ``teacher.route_by``; None where there is one teacher for all."""
    column, routes = config.teacher.route_by, config.teacher.routes
    if column is None:
        return None

    def route_of(prompt: Prompt) -> str:
        name = _value(prompt, column)
        return name if name in routes else ""

    return route_of


def check_routes(config: Config, prompts: Iterable[Prompt]) -> None:
    """Every prompt must have a teacher.

    Raises:
        DataError: one has none.
    """
    column, routes = config.teacher.route_by, config.teacher.routes
    if column is None or config.teacher.base_urls:
        return
    for prompt in prompts:
        name = _value(prompt, column)
        if name not in routes:
            raise DataError(
                f"prompt {prompt.id!r} has {column} = {name!r} and teacher.routes has no such route",
                f"one of {', '.join(routes)}",
                "add the route, or set teacher.base_urls and teacher.model for all other prompts",
            )


def pool_teacher(config: Config, servers: Servers, ends: EndTokens | None = None) -> PoolTeacher:
    """The scorer; ``ends`` as for ``PoolTeacher``."""
    teacher = config.teacher
    return PoolTeacher(
        servers,
        route_of=router(config),
        log_prob_floor=teacher.log_prob_floor,
        max_unscored=teacher.max_unscored,
        ends=ends,
    )


def server_sampler(
    config: Config, servers: Servers, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> ServerSampler:
    """The sampler of methods in which the teacher samples."""
    return ServerSampler(servers, tokenizer, route_of=router(config), vocabulary=vocabulary)


def context(servers: Servers) -> int | None:
    """Tokens that every teacher takes: one less than its context, since a server always draws one more."""
    known = [route.context for route in servers.routes.values() if route.context is not None]
    return min(known) - 1 if known else None


def _value(prompt: Prompt, column: str) -> str:
    value = pick(prompt.fields, column)
    return str(value) if isinstance(value, str | int | float) else ""


def _tables(config: Config) -> dict[str, ServerConfig]:
    own: dict[str, ServerConfig] = {"": config.teacher} if config.teacher.base_urls else {}
    return {**own, **config.teacher.routes}


def _route(model: str | None, name: str, table: ServerConfig) -> RouteSettings:
    place = f"teacher.routes.{name}" if name else "teacher"
    served = table.model or model
    assert served is not None, "the config checks it"
    return RouteSettings(
        tuple(parse_base_url(url) for url in table.base_urls),
        served,
        load_secret(env=table.api_key_env, file=table.api_key_file, setting=f"{place}.api_key"),
        Names(f"{place}.base_urls", f"{place}.model", f"{place}.api_key_env"),
    )
