"""``scope eval`` with servers: options, and a sampler over any OpenAI-style server that knows token ids (vLLM).

Only the tokenizer is read here: prompts are rendered and tokenised as for a model in this process, and token ids are
sent. A response ends at the end tokens that are known here, or at those that the server knows besides.

Not covered: which weights a server holds; its name for them is taken at its word, and recorded.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scope_opd.addresses import BaseUrl, check_variable_name, parse_base_url
from scope_opd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from scope_opd.config import Config
    from scope_opd.rollout.samplers import Samplers
    from scope_opd.rollout.served import ServedSampler
    from scope_opd.types import Prompt, Rollout, SamplingParams


@dataclass(frozen=True, slots=True)
class Served:
    """Servers of one model, as the options name them.

    Attributes:
        urls: at least one.
        model: the name that they serve it under.
        key_env, key_file: where their key is.
        ca_bundle: certificate authorities (PEM) for https.
        allow_unprotected: accept a server elsewhere that answers development routes to anybody.
    """

    urls: tuple[BaseUrl, ...]
    model: str
    key_env: str | None = None
    key_file: Path | None = None
    ca_bundle: Path | None = None
    allow_unprotected: bool = False


def served_options(
    urls: Sequence[str],
    served_model: str | None,
    key_env: str | None,
    key_file: Path | None,
    ca_bundle: Path | None,
    allow_unprotected: bool,
    **useless: Any,
) -> Served | None:
    """Check the options; None where no server is named.

    Args:
        useless: options that mean nothing with servers, by name; None where not given.

    Raises:
        ConfigError: an address or a name is wrong, or options do not go together.
    """
    if not urls:
        given = {"--served-model": served_model, "--api-key-env": key_env, "--api-key-file": key_file,
                 "--ca-bundle": ca_bundle, "--allow-unprotected-routes": allow_unprotected or None}  # fmt: skip
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name} without --base-url", "the address of a server", f"leave {name} out")
        return None
    if served_model is None:
        raise ConfigError(
            "--base-url without --served-model", "the name that the servers call the model", "give --served-model NAME"
        )
    for name, value in useless.items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} with --base-url", "options of sampling and judging", f"leave {option} out")
    try:
        addresses = tuple(dict.fromkeys(parse_base_url(url) for url in urls))
        if key_env is not None:
            check_variable_name(key_env, "--api-key-env")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Served(addresses, served_model, key_env, key_file, ca_bundle, allow_unprotected)


def open_served_sampler(config: Config, served: Served, tokenizer: PreTrainedTokenizerBase) -> ServedSampler:
    """Meet the servers. The caller closes the sampler.

    Raises:
        ConfigError: a setting is wrong, or no server answers.
    """
    from scope_opd.cli.servers import fixed_tokens
    from scope_opd.rollout.samplers import Samplers
    from scope_opd.serving.pool import Names, PoolSettings
    from scope_opd.serving.route import ClientSettings, RouteSettings
    from scope_opd.serving.secrets import load_secret

    ends = _known_ends(config, tokenizer)
    key_file = None if served.key_file is None else str(served.key_file)
    key = load_secret(env=served.key_env, file=key_file, setting="--api-key")
    names = Names("--base-url", "--served-model", "--api-key-env", "--allow-unprotected-routes")
    samplers = Samplers(
        RouteSettings(served.urls, served.model, key, names),
        client=ClientSettings(
            ca_bundle=None if served.ca_bundle is None else str(served.ca_bundle.expanduser()),
            allow_unprotected=served.allow_unprotected,
        ),
        pool=PoolSettings(deadline_s=3600.0, max_concurrency=config.rollout.max_rows or 1),
        prompt=fixed_tokens(tokenizer)[:4],
        shown=repr(served.model),
    )
    try:
        for line in samplers.open():
            print(f"warning: {line}", file=sys.stderr)
        _say_if_raw(config, samplers)
    except BaseException:
        samplers.close()
        raise
    return _sampler(samplers, tokenizer, ends)


def _say_if_raw(config: Config, samplers: Samplers) -> None:
    eval_ = config.eval
    if (eval_.temperatures[0], eval_.top_p, eval_.top_k, eval_.repetition_penalty) == (1.0, 1.0, 0, 1.0):
        return
    samplers.thread.run(samplers.learn_honesty(demand=False))
    if not all(samplers.honest(endpoint) for endpoint in samplers.endpoints if endpoint.state == "up"):
        print(
            "note: a server reports the model's own log-probs, not those of the distribution that samples: nll is left "
            "out (--logprobs-mode processed_logprobs has it report them)",
            file=sys.stderr,
        )


def _sampler(samplers: Samplers, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> ServedSampler:
    from scope_opd.rollout.served import ServedSampler

    class EndingSampler(ServedSampler):
        """Ends responses at the tokens that are known here, whatever a task's parameters say."""

        async def sample(
            self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
        ) -> AsyncIterator[Rollout]:
            ending: Any = super().sample(
                prompts, replace(params, stop_token_ids=ends), step=step, policy_version=policy_version
            )
            async with aclosing(ending):
                async for rollout in ending:
                    yield rollout

    return EndingSampler(samplers, tokenizer, known_ends=False, need_logprobs=False)


def _known_ends(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End tokens of the tokenizer, of the generation config beside it where there is one, and those asked for."""
    from transformers import GenerationConfig

    from scope_opd.models.places import resolve_path

    ids = set(config.chat.stop_token_ids or ())
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    with suppress(OSError, ValueError):
        place = resolve_path(config.model.tokenizer or config.model.path)
        declared = GenerationConfig.from_pretrained(place, revision=config.model.revision).eos_token_id
        ids.update([declared] if isinstance(declared, int) else declared or ())
    return tuple(sorted(ids))
