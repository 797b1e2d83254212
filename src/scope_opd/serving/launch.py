"""From a config to the command line and environment of a vLLM server: ``PYTHON -m vllm.entrypoints...``. Pure.

Settings that the trainer depends on are always named, so that neither a checkpoint nor a newer vLLM can change them:
the served name, the context, the log-probs of the distribution that sampled, no sampling defaults of the checkpoint.
The key travels in the environment alone.

Not covered: starting and stopping (``process``), what is in the model's folder (the caller says), TLS (a proxy's task),
several nodes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from scope_opd.addresses import BaseUrl, parse_base_url
from scope_opd.config import Config, ServerConfig, ServerFlags
from scope_opd.errors import ConfigError

Kind = Literal["teacher", "student"]

MODULE = "vllm.entrypoints.openai.api_server"
INSIDE = Path(__file__).resolve().parent / "inside"
"""The only folder of ours that a server imports from."""
KEY_VARIABLE = "VLLM_API_KEY"
EXTENSION = "scope_vllm.WeightReload"
PROMPT_LOGPROB_BYTES = 1 << 30
"""Memory that the prompt log-probs of one prefill chunk may take; vLLM does not reserve it when it sizes its cache."""
BYTES_A_LOGIT = 6
"""A bfloat16 logit and its float32 log-prob."""
SMALLEST_CHUNK, LARGEST_CHUNK = 256, 8192
UNKNOWN_VOCABULARY = 262_144
"""Assumed where the model's config cannot be read: as large as any in use."""
OURS = ("--model", "--host", "--port", "--served-model-name", "--api-key")
"""Options that the config's own settings say; ``extra_args`` may not say them again."""


@dataclass(frozen=True, slots=True)
class Served:
    """What is to be served.

    Attributes:
        model: a folder or a hub id.
        revision, tokenizer, trust_remote_code: as in the config; None, that of the model.
        vocabulary: rows of its head, None where unknown.
        context: tokens that a sequence may have, None where unknown.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    vocabulary: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """A server to be started.

    Attributes:
        argv: command line; holds no secret.
        env: variables to be set on top of the shell's, without the key; an empty text unsets one.
        url: where it will answer; ``host`` and ``port`` of it, as a socket takes them.
        model: the name that it is served under.
        key_env, key_file: where its key comes from.
        warnings: lines worth showing before the start.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    url: BaseUrl
    host: str
    port: int
    model: str
    key_env: str | None = None
    key_file: str | None = None
    warnings: tuple[str, ...] = field(default=())

    def shell(self) -> str:
        """The same as a command for a shell. The key stays where it is: the shell reads it when the command runs."""
        key = '""'
        if self.key_env is not None:
            key = f'"${self.key_env}"'
        elif self.key_file is not None:
            key = f'"$(cat {shlex.quote(str(Path(self.key_file).expanduser()))})"'
        words = [f"{name}={shlex.quote(value)}" for name, value in self.env.items() if name != KEY_VARIABLE]
        lines, rest = [" ".join([*words, f"{KEY_VARIABLE}={key}"]), shlex.join(self.argv[:3])], list(self.argv[3:])
        while rest:  # an option and its value share a line
            count = 2 if len(rest) > 1 and not rest[1].startswith("--") else 1
            lines.append(shlex.join(rest[:count]))
            del rest[:count]
        return " \\\n  ".join(lines)


def plan_launch(
    config: Config,
    kind: Kind,
    served: Served,
    *,
    python: str,
    on_cpu: bool,
    shell: Mapping[str, str],
    cores: int,
    replica: int = 0,
    route: str | None = None,
) -> Launch:
    """What ``scope serve`` starts.

    Args:
        config: names addresses, model name, key and flags.
        kind: what is served.
        served: its model.
        python: the interpreter.
        on_cpu: its vLLM computes on the CPU.
        shell: the environment that it will inherit, for settings which the user made there.
        cores: of this machine.
        replica: which of the table's ``base_urls``.
        route: of the teacher, where there are several.

    Raises:
        ConfigError: no such address, one that a server cannot have, flags that contradict the config, or development
            routes that others could reach.
    """
    name, table = _table(config, kind, route)
    url, host, port = _address(name, table, replica)
    flags = config.serving.teacher if kind == "teacher" else config.serving.student
    model = table.model or config.teacher.model
    assert model is not None, "the config checks it"
    _check_flags(f"serving.{kind}", flags)
    environment = _environment(config, kind, served, on_cpu=on_cpu, shell=shell, cores=cores)
    warnings = _check_exposure(config, kind, name, table, url, environment)
    argv = [python, "-m", MODULE, "--model", served.model, "--served-model-name", model]
    argv += ["--host", host, "--port", str(port)]
    if served.revision is not None:
        argv += ["--revision", served.revision]
    if served.tokenizer is not None:
        argv += ["--tokenizer", served.tokenizer]
    if served.trust_remote_code:
        argv.append("--trust-remote-code")
    argv += _flags(config, kind, flags, served, on_cpu=on_cpu)
    if kind == "student":
        argv += ["--worker-extension-cls", EXTENSION]
        # Idle unless rollout.sync asks for it; a server need not be started again for another way of syncing.
        argv += ["--weight-transfer-config", json.dumps({"backend": "scope"})]
        if config.rollout.colocated:
            argv.append("--enable-sleep-mode")
    argv += [*flags.extra_args]
    return Launch(
        tuple(argv), environment, url, host, port, model, table.api_key_env, table.api_key_file, tuple(warnings)
    )


def context_needed(config: Config, kind: Kind) -> int:
    """Tokens that a server of this config must take: prompt, response and the one that it always draws more."""
    longest = config.rollout.max_tokens
    if kind == "student":  # it also samples for evaluation
        longest = max(longest, config.eval.max_tokens or 0)
    return config.data.max_prompt_tokens + longest + 1


def chunk_tokens(vocabulary: int | None, max_num_seqs: int | None = None) -> int:
    """Tokens of a prefill chunk whose prompt log-probs fit ``PROMPT_LOGPROB_BYTES``.

    vLLM computes logits for every prompt token of a request in a chunk at once: about ``BYTES_A_LOGIT`` x tokens x
    vocabulary. With chunked prefill a chunk may be shorter than the context; it may not be shorter than the number of
    sequences.

    Args:
        vocabulary: rows of the head.
        max_num_seqs: sequences at once, where that is set.
    """
    bound = PROMPT_LOGPROB_BYTES // (BYTES_A_LOGIT * (vocabulary or UNKNOWN_VOCABULARY)) // 128 * 128
    return max(SMALLEST_CHUNK, max_num_seqs or 0, min(LARGEST_CHUNK, bound))


def _table(config: Config, kind: Kind, route: str | None) -> tuple[str, ServerConfig]:
    if kind == "student":
        if route is not None:
            raise ConfigError(f"--route {route} for the student", "a teacher's route", "leave --route out")
        return "rollout", config.rollout
    if route is None:
        known = ", ".join(config.teacher.routes)
        if not config.teacher.base_urls and known:
            raise ConfigError("teacher.base_urls is empty", f"--route with one of {known}", "add --route")
        return "teacher", config.teacher
    if route not in config.teacher.routes:
        known = ", ".join(config.teacher.routes) or "none is set"
        raise ConfigError(f"--route {route}: teacher.routes has no such route", f"one of: {known}", "change --route")
    return f"teacher.routes.{route}", config.teacher.routes[route]


def _address(name: str, table: ServerConfig, replica: int) -> tuple[BaseUrl, str, int]:
    if not table.base_urls:
        raise ConfigError(
            f"{name}.base_urls is empty", "the address to serve at",
            f'set it, for example {name}.base_urls = ["http://127.0.0.1:8000/v1"], and {name}.model',
        )  # fmt: skip
    if not 0 <= replica < len(table.base_urls):
        raise ConfigError(
            f"--replica {replica}: {name}.base_urls has {len(table.base_urls)}",
            f"0 to {len(table.base_urls) - 1}", "change --replica, or add an address",
        )  # fmt: skip
    url = parse_base_url(table.base_urls[replica])
    parts = urlsplit(url.text)
    if parts.scheme != "http":
        raise ConfigError(
            f"{name}.base_urls has {url}: a server started here speaks http", "http://HOST:PORT/v1",
            "give https to a proxy in front of it, and start the server with --set on its own address",
        )  # fmt: skip
    if parts.path != "/v1":
        raise ConfigError(
            f"{name}.base_urls has {url}: a server started here answers under /v1 alone", "http://HOST:PORT/v1",
            "give the prefix to a proxy in front of it, and start the server with --set on its own address",
        )  # fmt: skip
    assert parts.hostname, "parse_base_url checks it"
    return url, parts.hostname, parts.port or 80


def _check_flags(name: str, flags: ServerFlags) -> None:
    for word in flags.extra_args:
        option = word.split("=", 1)[0].replace("_", "-")
        if option in OURS:  # its value may be a key: it is not repeated
            raise ConfigError(
                f"{name}.extra_args has {option}", "options that the config does not say elsewhere",
                "use api_key_env" if option == "--api-key" else "use base_urls, model and path",
            )  # fmt: skip


def _check_exposure(
    config: Config, kind: Kind, name: str, table: ServerConfig, url: BaseUrl, environment: Mapping[str, str]
) -> list[str]:
    if url.loopback:
        return []
    own = config.rollout if kind == "student" else config.teacher
    if environment.get("VLLM_SERVER_DEV_MODE", "0") != "0" and not own.allow_unprotected_routes:
        section = "rollout" if kind == "student" else "teacher"
        raise ConfigError(
            f"{name}.base_urls has {url}, which is not this machine's loopback interface, and the server would answer "
            "development routes there without a key: whoever reaches it could stop it or load other weights",
            "an address such as http://127.0.0.1:8000/v1",
            f"use a tunnel to it, or set {section}.allow_unprotected_routes = true in a network that is yours",
        )
    if table.api_key_env is None and table.api_key_file is None:
        return [f"{url} is not a loopback address and {name}.api_key_env is not set: anybody who reaches it may use it"]
    return []


def _flags(config: Config, kind: Kind, flags: ServerFlags, served: Served, *, on_cpu: bool) -> list[str]:
    context = flags.max_model_len or context_needed(config, kind)
    if flags.max_model_len is None and served.context is not None:
        context = min(context, served.context)
    chunk = flags.max_num_batched_tokens
    if chunk is None and kind == "teacher":
        chunk = chunk_tokens(served.vocabulary, flags.max_num_seqs)
    likeliest = max(flags.max_logprobs, config.objective.teacher_topk if kind == "teacher" else 0)
    words = ["--dtype", flags.dtype, "--max-model-len", str(context), "--max-logprobs", str(likeliest)]
    # Prompt log-probs are the same either way; sampled ones are then those of the distribution that sampled.
    words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    if kind == "teacher":
        words.append("--enable-chunked-prefill")
    elif on_cpu:
        # vLLM rewinds the generator of a seeded request whose prefill is split; torch's for the CPU cannot, and the
        # server would end (weights that change in flight have many prefixes computed anew at once).
        words.append("--no-enable-chunked-prefill")
    for option, value in (
        ("--max-num-batched-tokens", chunk),
        ("--max-num-seqs", flags.max_num_seqs),
        ("--gpu-memory-utilization", flags.gpu_memory_utilization),
        ("--tensor-parallel-size", flags.tensor_parallel_size if flags.tensor_parallel_size > 1 else None),
    ):
        words += [] if value is None else [option, str(value)]
    words += ["--enforce-eager"] if flags.enforce_eager else []
    return [*words, "--disable-uvicorn-access-log"]


def _environment(
    config: Config, kind: Kind, served: Served, *, on_cpu: bool, shell: Mapping[str, str], cores: int
) -> dict[str, str]:
    given = config.serving.env
    if KEY_VARIABLE in given:
        raise ConfigError(f"serving.env sets {KEY_VARIABLE}", "no key in a config", "use api_key_env or api_key_file")
    # Of the shell's: another key would lock the trainer out, other modules would come before the environment's own.
    values = {
        KEY_VARIABLE: "",
        "PYTHONPATH": str(INSIDE) if kind == "student" else "",
        "VLLM_SERVER_DEV_MODE": "1" if kind == "student" else "0",
    }
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if Path(served.model).is_dir() and not served.trust_remote_code:
        defaults["HF_HUB_OFFLINE"] = "1"
    if on_cpu:
        defaults |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(cores),
        }
    values |= {name: value for name, value in defaults.items() if name not in shell}
    values |= given
    if kind == "student" and given.get("PYTHONPATH"):
        values["PYTHONPATH"] = f"{INSIDE}:{given['PYTHONPATH']}"
    if kind == "student" and values["VLLM_SERVER_DEV_MODE"] != "1":
        raise ConfigError(
            f"serving.env sets VLLM_SERVER_DEV_MODE = {values['VLLM_SERVER_DEV_MODE']!r}",
            "'1' for a student, which gets its weights through development routes", "remove it",
        )  # fmt: skip
    return values


def root_cause(lines: Sequence[str], limit: int = 400) -> str:
    """What killed a server, from the last lines of its log: the first error named there, else the last lines."""
    named = [place for place, line in enumerate(lines) if _names_an_error(line)]
    # pydantic tells what is wrong on the next line.
    found = [" ".join(lines[place : place + 2 if "validation error" in lines[place] else place + 1]) for place in named]
    chosen = list(dict.fromkeys([found[0], found[-1]])) if found else [*lines[-3:]]
    text = " ... ".join(" ".join(line.split()) for line in chosen)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def _names_an_error(line: str) -> bool:
    head, colon, rest = line.partition(": ")
    word = head.split()[-1] if head.split() else ""
    return bool(colon and rest.strip()) and word.endswith(("Error", "Exception")) and word[0].isalpha()
