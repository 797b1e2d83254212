"""The config of a run: typed tables, strict keys, presets, and the rules that hold between settings.

Every table is a pydantic model that refuses unknown keys (with the nearest known name). Mistakes become a
``ConfigError`` with the value found, the value expected and the remedy. Nothing here touches a model or a device: what
exists is checked where it is opened. Secrets never live in a config: fields name the environment variable or file that
holds them.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from scope_opd.addresses import check_variable_name, looks_like_a_key, parse_base_url
from scope_opd.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path in which ``~`` is the home folder."""
AlarmAction = Literal["off", "warn", "stop"]

# A preset that names no aggregation leaves it to the method; "released" is meant for the methods with two paths.
PRESETS: dict[str, dict[str, Any]] = {
    # J = E_x [ sum_correct softmax(+NLL_S/tau) L_MLE + sum_wrong softmax(-NLL_T/tau) L_OPD ], paper Eq. 4-6.
    "paper": {
        "student_weight": "ppl",
        "teacher_weight": "inverse_ppl",
        "scale": "sum",
        "truncated": "incorrect",
    },
    # What the release's run scripts do: w = n_path * softmax(-NLL/tau) on both paths.
    "as_released": {
        "student_weight": "inverse_ppl",
        "teacher_weight": "inverse_ppl",
        "scale": "mean",
        "aggregation": "released",
        "temperature": "released",
        "truncated": "incorrect",
    },
    # What the release's README flags do: the student weight reversed as above, the teacher's reversed too.
    "as_documented": {
        "student_weight": "inverse_ppl",
        "teacher_weight": "ppl",
        "scale": "mean",
        "aggregation": "released",
        "temperature": "released",
        "truncated": "incorrect",
    },
}


class Table(BaseModel):
    """Base of every table: unknown keys are errors, values are not silently converted."""

    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True, protected_namespaces=())


class ModelConfig(Table):
    """The student. ``path`` is a Hugging Face folder, a hub id, or ``zoo:student``."""

    path: str = "zoo:student"
    revision: str | None = None
    tokenizer: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False


class ServerConfig(Table):
    """Servers of one teacher. The key is in an environment variable or a file, never here.

    ``base_urls``: OpenAI-style addresses such as ``http://host:8000/v1``; all serve the same weights. ``model``: the
    name that they serve them under.
    """

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
            return check_variable_name(text, "teacher.api_key_env")
        if text is not None and looks_like_a_key(text):
            raise ValueError("teacher.api_key_file holds what looks like a key; expected the path of a file with it")
        return text


class TeacherConfig(ServerConfig):
    """The teacher: in process (``path``), or behind servers (``base_urls``, or ``routes``; docs/serving.md).

    In process: ``path`` as for the student; ``dtype`` holds its weights ("auto": bfloat16 on a GPU, float32 on a CPU);
    ``max_tokens_per_batch`` bounds prompt + response tokens scored in one forward pass.

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


class DataConfig(Table):
    """Where problems come from: ``zoo``, a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, or a hub data set.

    A hub data set is ``hf:OWNER/NAME``, with ``?subset=..&split=..&revision=..`` behind it as needed. Columns are
    named; a dotted name (``extra.answer``) reaches into an object, and a problem column may hold chat messages.
    The layout of verl's users (``prompt``, ``reward_model.ground_truth``) is recognised where the columns are left at
    their defaults. ``fix_double_braces`` mends a literal ``boxed{{}}`` in prompts.
    ``on_bad_row``: a row that fails a check ends the run with one line ("error"), or is counted and listed ("skip").
    ``max_rows`` takes the first rows of ``train`` only; ``eval.problems`` does so for evaluation.
    ``verifier``: "auto" is the zoo's own for the zoo, else maths or code by the shape of each answer; "boxed" compares
    the last box as text.
    """

    train: UserPath = "zoo"
    eval: UserPath | None = None
    problem_column: str = "problem"
    answer_column: str = "answer"
    id_column: str = "id"
    fix_double_braces: bool = False
    on_bad_row: Literal["error", "skip"] = "error"
    verifier: Literal["auto", "zoo", "math", "code", "boxed"] = "auto"
    max_prompt_tokens: PositiveInt = 4096
    shuffle: bool = True
    max_rows: PositiveInt | None = None


class VerifyConfig(Table):
    """How answers are judged, in training and evaluation alike (docs/judging.md).

    ``scope``: what of a response may hold the answer, "after_think" (what follows the thinking block) or "all".
    ``fallback``: without a box, take what follows "answer is" or the last number. ``tolerance``: for numbers, absolute
    (0.01) or relative ("1%"); a row's own wins. ``timeout_s``: CPU seconds a maths answer at most.
    ``workers``: processes that judge; None: one for each core.
    ``code_timeout_s``, ``code_memory_mb``: wall time and memory that a solution may use for one test.
    ``allow_unsandboxed`` runs code without bubblewrap: only where all of it is trusted.
    """

    scope: Literal["after_think", "all"] = "after_think"
    fallback: bool = True
    tolerance: NonNegativeFloat | str | None = None
    timeout_s: PositiveFloat = 5.0
    workers: PositiveInt | None = None
    code_timeout_s: PositiveFloat = 10.0
    code_memory_mb: PositiveInt = 1024
    allow_unsandboxed: bool = False


class ChatConfig(Table):
    """How a problem becomes a prompt, in training and evaluation alike.

    ``template``: None, the tokenizer's own chat template; "none", the bare problem; else a path to a Jinja file.
    ``kwargs`` go to the template (``enable_thinking = false``). ``suffix`` is appended to the problem.
    ``stop_token_ids`` are added to the model's own end tokens.
    """

    template: UserPath | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    system: str | None = None
    suffix: str = ""
    stop_token_ids: list[int] = Field(default_factory=list)


class RolloutConfig(Table):
    """Sampling in training. ``max_rows`` bounds the sequences decoded at once; None: all of a step."""

    n: PositiveInt = 8
    temperature: PositiveFloat = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    repetition_penalty: PositiveFloat = 1.0
    max_tokens: PositiveInt = 1024
    max_rows: PositiveInt | None = None


class ObjectiveConfig(Table):
    """The method and its surrogate. Fields left out take the preset's value, then the method's own, then these.

    ``preset``: "paper", "as_released" or "as_documented" (see ``PRESETS``); None is the paper's formula with truncated
    rollouts ignored. ``aggregation``, ``clip`` and ``dual_clip`` default to what the method declares; "off" is no clip
    whatever it declares.
    ``reward_threshold``: a rollout whose reward is at least this is correct, where a verifier gives rewards that are
    not 0 or 1. ``method_settings`` go to methods of your own; ``plugins`` names the modules that register them.
    """

    method: str = "scope"
    preset: Literal["paper", "as_released", "as_documented"] | None = None
    tau: PositiveFloat = 1.0
    student_weight: Literal["ppl", "uniform", "inverse_ppl"] = "ppl"
    teacher_weight: Literal["inverse_ppl", "uniform", "ppl"] = "inverse_ppl"
    scale: Literal["sum", "mean"] = "sum"
    truncated: Literal["ignore", "incorrect"] = "ignore"
    reward_threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    beta: NonNegativeFloat = 1.0
    distill: Literal["sampled", "full_kl"] = "sampled"
    temperature: Literal["matched", "released", "raw"] = "matched"
    aggregation: Literal["prompt", "token", "sequence", "released"] | None = None
    clip: PositiveFloat | Literal["off"] | None = None
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | Literal["off"] | None = None
    sampler_correction_cap: PositiveFloat = 2.0
    reference_kl: NonNegativeFloat = 0.0
    method_settings: dict[str, Any] = Field(default_factory=dict)
    plugins: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS[preset], **values} if isinstance(preset, str) and preset in PRESETS else values


class TrainConfig(Table):
    """The optimiser and the step.

    ``max_tokens_per_microbatch`` bounds prompt + response tokens (padding included) of one forward and backward pass;
    it changes memory and speed, never the gradient. ``param_dtype = "bfloat16"`` is the paper's pure-bf16 training:
    most updates at small learning rates round to nothing there; float32 keeps fp32 master weights (bf16 autocast on a
    GPU). ``threads``: torch intra-op threads; None leaves torch's choice.
    """

    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 16
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 2e-6
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegativeInt = 0
    min_lr_ratio: Share = 0.0
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    grad_clip: PositiveFloat | Literal["off"] = 1.0
    updates_per_batch: PositiveInt = 1
    max_tokens_per_microbatch: PositiveInt = 16384
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    device: str = "auto"
    threads: Annotated[int, Field(gt=0, le=4096)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _betas_from_toml(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            return {**values, "betas": tuple(values["betas"])}
        return values


class EvalConfig(Table):
    """Evaluation on held-out prompts while training. ``every = 0``: only where at_start / at_end ask for it.

    One set of ``n`` samples a problem is drawn for each of ``temperatures``; the other sampling settings are shared.
    """

    every: NonNegativeInt = 0
    at_start: bool = False
    at_end: bool = False
    problems: PositiveInt = 200
    n: PositiveInt = 8
    temperatures: list[PositiveFloat] = Field(default_factory=lambda: [0.6], min_length=1)
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    repetition_penalty: PositiveFloat = 1.0
    max_tokens: PositiveInt | None = None


class AlarmsConfig(Table):
    """What to do when a run looks ill: "off", "warn" (one line, an event) or "stop" (checkpoint, exit code 1)."""

    nan: AlarmAction = "stop"
    entropy_halved: AlarmAction = "warn"
    entropy_window: PositiveInt = 20
    truncation: AlarmAction = "warn"
    truncation_share: Share = 0.5
    length_growth: AlarmAction = "warn"
    length_growth_ratio: Annotated[float, Field(gt=1)] = 2.0
    grad_norm: AlarmAction = "warn"
    grad_norm_ratio: Annotated[float, Field(gt=1)] = 10.0
    uniform_weights: AlarmAction = "warn"
    uniform_ess: Share = 0.99


class RunConfig(Table):
    """The run folder and what is kept. ``checkpoint_every = 0``: only at the end, on a signal or on an alarm's stop.

    ``rollouts_logged``: rollouts of each step in rollouts.jsonl, rounded to whole groups (at least one, if not 0).
    """

    dir: UserPath = "runs/run"
    seed: Seed = 0
    checkpoint_every: NonNegativeInt = 50
    keep_last: PositiveInt = 2
    rollouts_logged: NonNegativeInt = 16
    export: bool = True
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    project: str = "scope"
    alarms: AlarmsConfig = Field(default_factory=AlarmsConfig)


class Config(Table):
    """All tables of a run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @model_validator(mode="after")
    def _between_tables(self) -> Config:
        plain = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
        for name, neutral in plain.items():
            value = getattr(self.rollout, name)
            if value != neutral:
                raise ValueError(
                    f"rollout.{name} = {value}; expected {neutral}: a cut or penalised distribution has no simple "
                    f"importance ratio; remove it from [rollout] (it is allowed in [eval])"
                )
        if self.teacher.served and self.objective.distill == "full_kl":
            raise ValueError(
                "objective.distill = 'full_kl' with a teacher behind servers; expected 'sampled', since servers give "
                "no logits; load the teacher in process (teacher.path without base_urls), or set objective.distill"
            )
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply dotted overrides, validate.

    Args:
        path: the TOML file; None starts from the defaults.
        overrides: ``table.key=value`` strings; the value is read as TOML, and as a plain string where that fails.

    Raises:
        ConfigError: file missing, not UTF-8 or not TOML, unknown key, wrong type or value, rules between tables broken.
    """
    values: dict[str, Any] = {}
    if path is not None:
        source = Path(path).expanduser()
        try:
            values = tomllib.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{source}: no such file", "a TOML config file", "check the path") from None
        except IsADirectoryError:
            raise ConfigError(f"{source} is a folder", "a TOML config file", "name the file itself") from None
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}", "a readable file", "check its permissions") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: byte {error.start} is not UTF-8", "UTF-8 text", "re-save the file") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source}: {error}", "valid TOML", "mend that line") from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
            raise ConfigError(f"{source}: {error}", "TOML with plain values", "mend the file") from None
    for override in overrides:
        _apply_override(values, override)
    return validate_config(values)


def validate_config(values: dict[str, Any]) -> Config:
    """Turn nested plain values into a ``Config``; every pydantic complaint becomes one ``ConfigError`` line."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override}", "TABLE.KEY=VALUE", "for example --set objective.tau=0.5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text
    except RecursionError as error:
        raise ConfigError(f"--set {name}: {error}", "TABLE.KEY=VALUE", "give a plain value") from None
    node = values
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {key} is not a table", "TABLE.KEY=VALUE", "check the name")
    node[keys[-1]] = value


def _explain(error: ValidationError) -> ConfigError:
    # A value that may be of several kinds gives a complaint a kind: together they are one.
    by_place: dict[tuple[str, ...], list[Any]] = {}
    for each in error.errors(include_url=False):
        by_place.setdefault(_place([str(part) for part in each["loc"]]), []).append(each)
    place, problems = next(iter(by_place.items()))
    problem, location = problems[0], list(place)
    name = ".".join(location)
    more = len(by_place) - 1
    also = f" ({more} more after this one)" if more else ""
    if problem["type"] == "extra_forbidden":
        known = list(_known_keys(location[:-1]))
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        kind = "key" if location[:-1] else "table"
        remedy = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else "remove it"
        return ConfigError(f"unknown {kind} {name}", f"one of {', '.join(sorted(known))}", remedy + also)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return ConfigError(message + also)
    if problem["type"] == "missing":  # only an element of a list can be missing: every key has a default
        return ConfigError(f"{'.'.join(location[:-1])} = {problem['input']!r}", "more elements", f"add them{also}")
    messages = [each["msg"].removeprefix("Input should be ").removeprefix("a valid ") for each in problems]
    expected = " or ".join(dict.fromkeys(messages))
    return ConfigError(f"{name} = {problem['input']!r}", expected, f"change {name}{also}")


def _place(location: Sequence[str]) -> tuple[str, ...]:
    """A complaint's place without pydantic's name of the kind that it tried, where a value may be of several kinds."""
    model: type[BaseModel] = Config
    for depth, part in enumerate(location, start=1):
        if part not in model.model_fields:
            break
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
            continue
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        if get_origin(annotation) in (Union, UnionType) and len(kinds) > 1:
            return tuple(location[:depth])
        break
    return tuple(location)


def _known_keys(tables: Sequence[str]) -> Iterator[str]:
    model: type[BaseModel] = Config
    names = iter(tables)
    for table in names:
        annotation = model.model_fields[table].annotation
        if get_origin(annotation) is dict and next(names, None) is not None:  # tables under names of the user's choice
            annotation = get_args(annotation)[1]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return
        model = annotation
    yield from model.model_fields
