"""From ``[rollout]`` to servers that sample, and to the sync that brings them the student's weights.

Not covered: what a server does (``rollout.samplers``, ``rollout.served``, ``rollout.weight_sync``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scope_opd.addresses import parse_base_url
from scope_opd.cli.servers import fixed_tokens
from scope_opd.config import Config
from scope_opd.errors import ConfigError, RunFailed
from scope_opd.models.head import HeadView, response_logprobs
from scope_opd.objective.methods import Method
from scope_opd.rollout.samplers import NAMES, Samplers
from scope_opd.rollout.served import ServedSampler
from scope_opd.rollout.weight_sync.carrier import Carrier
from scope_opd.rollout.weight_sync.files import Files
from scope_opd.rollout.weight_sync.native import Native
from scope_opd.rollout.weight_sync.publisher import Publisher
from scope_opd.serving.control import Control
from scope_opd.serving.faults import Fault
from scope_opd.serving.pool import PoolSettings
from scope_opd.serving.route import ClientSettings, RouteSettings
from scope_opd.serving.secrets import load_secret

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIMIT_NAME = "sampling servers"
"""What their context is called where a prompt does not fit."""


def check_sampled_by(config: Config, method: Method) -> None:
    """Servers of the student are of use only where the student samples.

    Raises:
        ConfigError: the teacher does.
    """
    if config.rollout.served and method.sampled_by == "teacher":
        raise ConfigError(
            f"rollout.base_urls with objective.method = {config.objective.method!r}",
            "no servers of the student, since the teacher samples",
            "remove it, or give teacher.base_urls in its place",
        )


def open_samplers(config: Config, tokenizer: PreTrainedTokenizerBase) -> Samplers:
    """A client for the servers of ``[rollout]``, which has met none of them yet. The caller closes it.

    Args:
        config: with ``rollout.served``.
        tokenizer: the student's.

    Raises:
        ConfigError: a key or the certificates cannot be read.
    """
    rollout = config.rollout
    assert rollout.model is not None, "the config checks it"
    key = load_secret(env=rollout.api_key_env, file=rollout.api_key_file, setting="rollout.api_key")
    return Samplers(
        RouteSettings(tuple(parse_base_url(url) for url in rollout.base_urls), rollout.model, key, NAMES),
        client=ClientSettings(
            connect_timeout_s=rollout.connect_timeout_s,
            read_timeout_s=rollout.read_timeout_s,
            ca_bundle=rollout.ca_bundle,
            allow_unprotected=rollout.allow_unprotected_routes,
        ),
        pool=PoolSettings(deadline_s=rollout.deadline_s, max_concurrency=rollout.max_concurrency),
        prompt=fixed_tokens(tokenizer)[:4],
    )


def check_answers(config: Config, samplers: Samplers) -> None:
    """Before the run: whether the servers that are up report what they sample from, and take new weights at all.

    What is found out is kept by ``samplers``, which does not ask again.

    Raises:
        ConfigError: one does not.
    """

    async def ask() -> None:
        if config.rollout.temperature != 1.0:
            await samplers.learn_honesty(demand=True)
        for endpoint in samplers.endpoints:
            if endpoint.state == "up":
                with contextlib.suppress(Fault):  # it goes down, or is asked again by the first sync
                    await Control(samplers.http, endpoint).weight_version()

    try:
        samplers.thread.run(ask())
    except RunFailed as error:
        raise ConfigError(error.found, error.expected, error.remedy) from None


def served_sampler(samplers: Samplers, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> ServedSampler:
    """The sampler of training and of evaluation meanwhile.

    Args:
        samplers: open.
        tokenizer: the student's.
        vocabulary: ids that the student has rows for.
    """
    return ServedSampler(samplers, tokenizer, vocabulary=vocabulary)


def publisher(
    config: Config,
    samplers: Samplers,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    autocast: torch.dtype | None,
) -> Publisher:
    """What brings the student's weights to the servers. The caller closes it.

    Raises:
        ConfigError: the way that ``rollout.sync`` names is not open here.
    """
    rollout, served = config.rollout, config.serving.student.dtype
    dtype = None if served == "auto" else getattr(torch, served)
    carrier: Carrier
    if rollout.sync == "files":
        carrier = Files(Path(rollout.sync_dir or Path(config.run.dir) / "sync"), student, dtype=dtype)
    else:
        carrier = Native(student, rollout.sync, host=rollout.sync_host or "127.0.0.1", dtype=dtype)
    return Publisher(
        samplers,
        carrier,
        fixed_tokens(tokenizer),
        trainer_logprobs(student, autocast),
        tolerance=rollout.sync_tolerance,
        colocated=rollout.colocated,
    )


def trainer_logprobs(student: PreTrainedModel, autocast: torch.dtype | None) -> Callable[[Sequence[int]], list[float]]:
    """The student's log-probs of tokens 1, 2, ... of a text at temperature 1, in the precision that it trains in."""
    view = HeadView(student)

    def logprobs(token_ids: Sequence[int]) -> list[float]:
        device = student.get_input_embeddings().weight.device
        ids = torch.tensor([list(token_ids)], device=device)
        positions = torch.tensor([[0, place] for place in range(1, len(token_ids))], device=device)
        precision: Any = contextlib.nullcontext()
        if autocast is not None:
            precision = torch.autocast(device.type, dtype=autocast)
        with torch.no_grad(), precision:
            found = response_logprobs(view, ids, None, positions, 1.0, entropy=False).logprobs
        values: list[float] = found.double().tolist()
        return values

    return logprobs
