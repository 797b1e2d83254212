"""The tables of a config that may point at servers: teacher, rollouts, and how servers are started."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from scope_opd.addresses import check_variable_name, looks_like_a_key, parse_base_url
from scope_opd.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Share, Table, UserPath


class ServerConfig(Table):
    """Servers of one model. The key is in an environment variable or a file, never here.

    ``base_urls``: OpenAI-style addresses such as ``http://host:8000/v1``; all serve the same weights. ``model``: the
    name that they serve them under.
    """

    called: ClassVar[str] = "teacher"

    base_urls: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = (
        Field(default_factory=list)
    )
    model: str | None = None
    api_key_env: str | None = None
    api_key_file: str | None = None

    @field_validator("base_urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        found = [parse_base_url(url).text for url in urls]
        twice = sorted({url for url in found if found.count(url) > 1})
        if twice:
            raise ValueError(f"base_urls names {twice[0]} twice; expected each server once; remove one")
        return found

    @field_validator("api_key_env", "api_key_file")
    @classmethod
    def _no_key(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None and info.field_name == "api_key_env":
            return check_variable_name(text, f"{cls.called}.api_key_env")
        if text is not None and looks_like_a_key(text):
            raise ValueError(
                f"{cls.called}.api_key_file holds what looks like a key; expected the path of a file with it"
            )
        return text


class TeacherConfig(ServerConfig):
    """The teacher: in process (``path``), or behind servers (``base_urls``, or ``routes``; docs/serving.md).

    In process: ``path`` as for the student; ``dtype`` holds its weights ("auto": bfloat16 on a GPU, float32 on a CPU);
    ``max_tokens_per_batch`` bounds prompt + response tokens scored in one forward pass. ``keep_hidden_gib``: where
    ``objective.distill`` needs whole distributions, hidden states of scored rollouts kept in each rank's host memory,
    so that the update need not read them again; 0 keeps none.

    Behind servers: ``route_by`` names a column of the data; ``[teacher.routes.VALUE]`` is the teacher of prompts with
    that value, ``base_urls`` that of all others. ``tokenizer``: the teacher's, to be compared with the student's.
    ``served_temperature``: what the served model's logits are divided by (1 unless the served copy was made so).
    A request is tried again until ``deadline_s``; more than ``max_unscored`` of a step's requests without a score stop
    the run. ``fingerprint_tolerance``: nats a token by which the same model's log-probs may differ.

    For both: ``temperature`` is that of its own samples (``kd``); None: rollout's. ``log_prob_floor`` is the lowest
    log-prob a token may have; lower ones are raised to it and counted.
    """

    path: str = "zoo:teacher"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_tokens_per_batch: PositiveInt = 8192
    keep_hidden_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    temperature: PositiveFloat | None = None
    log_prob_floor: Annotated[float, Field(lt=0, allow_inf_nan=False)] = -100.0
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None
    served_temperature: PositiveFloat = 1.0
    ca_bundle: UserPath | None = None
    connect_timeout_s: PositiveFloat = 10.0
    read_timeout_s: PositiveFloat = 300.0
    deadline_s: PositiveFloat = 600.0
    max_concurrency: PositiveInt = 32
    max_unscored: Share = 0.01
    fingerprint_tolerance: PositiveFloat = 0.05
    allow_unprotected_routes: bool = False
    route_by: str | None = None
    routes: dict[str, ServerConfig] = Field(default_factory=dict)

    @property
    def served(self) -> bool:
        """Whether it is behind servers."""
        return bool(self.base_urls or self.routes)

    @property
    def shown(self) -> str:
        """What to call it."""
        names = [self.model, *(route.model for route in self.routes.values())]
        return ", ".join(name for name in names if name) if self.served else self.path

    @model_validator(mode="after")
    def _whole(self) -> TeacherConfig:
        if bool(self.routes) != (self.route_by is not None):
            found, other = ("routes", "route_by") if self.routes else ("route_by", "routes")
            raise ValueError(f"teacher.{found} without teacher.{other}; expected both or none; add the other")
        for name, route in {"": self, **self.routes}.items():
            place = f"teacher.routes.{name}" if name else "teacher"
            if name and not route.base_urls:
                raise ValueError(f"{place} has no base_urls; expected the address of a server; add it")
            if route.base_urls and not (route.model or self.model):
                raise ValueError(
                    f"{place}.base_urls without a model; expected the name that it is served under; add it"
                )
        return self


class RolloutConfig(ServerConfig):
    """Sampling in training: in process, or by vLLM servers (``base_urls``; docs/serving.md).

    In process: ``max_rows`` bounds the sequences decoded at once; None: all of a step.

    By servers: ``model``, the name that they serve the student under. After each optimiser step they get its weights:
    ``sync = "files"`` writes them to ``sync_dir`` (None: ``sync/`` in the run folder), which must have the same path
    on the servers' machines, and has them reloaded; "gloo" sends them over TCP, "nccl" between GPUs, "ipc" within one;
    for the first two ``sync_host`` is the trainer's address as the servers reach it (None: loopback). Then the
    log-probs of a fixed prompt must be the trainer's to ``sync_tolerance`` nats a token in the mean.
    ``max_staleness``: optimiser steps that a rollout's oldest token may lag behind; above 0 generation goes on while
    the trainer steps. ``colocated``: servers on the trainer's own GPU, put to sleep while it steps.
    ``max_concurrency``: requests under way at each server. ``deadline_s``: until then a sample is asked for again.
    """

    called: ClassVar[str] = "rollout"

    n: PositiveInt = 8
    temperature: PositiveFloat = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    repetition_penalty: PositiveFloat = 1.0
    max_tokens: PositiveInt = 1024
    max_rows: PositiveInt | None = None
    sync: Literal["files", "gloo", "nccl", "ipc"] = "files"
    sync_dir: UserPath | None = None
    sync_host: str | None = None
    sync_tolerance: PositiveFloat = 0.05
    max_staleness: NonNegativeInt = 0
    colocated: bool = False
    ca_bundle: UserPath | None = None
    connect_timeout_s: PositiveFloat = 10.0
    read_timeout_s: PositiveFloat = 300.0
    deadline_s: PositiveFloat = 3600.0
    max_concurrency: PositiveInt = 256
    allow_unprotected_routes: bool = False

    @property
    def served(self) -> bool:
        """Whether servers sample."""
        return bool(self.base_urls)

    @model_validator(mode="after")
    def _whole(self) -> RolloutConfig:
        if self.base_urls and not self.model:
            raise ValueError(
                "rollout.base_urls without a model; expected the name that the student is served under; add it"
            )
        for name in ("max_staleness", "colocated"):
            if getattr(self, name) and not self.base_urls:
                raise ValueError(f"rollout.{name} without rollout.base_urls; expected servers that sample; remove it")
        if self.colocated and self.max_staleness:
            raise ValueError(
                "rollout.colocated with max_staleness > 0; expected one of them, since servers that sleep while the "
                "trainer steps cannot generate meanwhile; remove one"
            )
        remote = [url for url in self.base_urls if not parse_base_url(url).loopback]
        if remote and self.sync in ("gloo", "nccl") and self.sync_host is None:
            raise ValueError(
                f"rollout.sync = {self.sync!r} with a server on another machine ({remote[0]}) and no sync_host; "
                "expected the trainer's address as the servers reach it; set rollout.sync_host"
            )
        if self.colocated and self.sync == "nccl":
            raise ValueError("rollout.colocated with sync = 'nccl'; expected 'ipc' or 'files' on one GPU; change it")
        return self


class ServerFlags(Table):
    """Flags of one kind of server (``scope serve``). None leaves what the config implies, or vLLM's default.

    ``max_model_len``: None, data.max_prompt_tokens + rollout.max_tokens + 1.
    ``max_num_batched_tokens``: tokens of a prefill chunk; None bounds the memory of prompt log-probs for a teacher.
    ``extra_args`` go to vLLM's command line as they are.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    max_logprobs: PositiveInt = 64
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    tensor_parallel_size: PositiveInt = 1
    enforce_eager: bool = False
    extra_args: list[str] = Field(default_factory=list)


class ServingConfig(Table):
    """How ``scope serve`` starts vLLM: ``python`` is the interpreter of an environment that has it (None: this one).

    ``env``: environment variables of the server, besides those of the shell. ``start_timeout_s``: until it is ready.
    """

    python: UserPath | None = None
    start_timeout_s: PositiveFloat = 900.0
    env: dict[str, str] = Field(default_factory=dict)
    teacher: ServerFlags = Field(default_factory=ServerFlags)
    student: ServerFlags = Field(default_factory=ServerFlags)
