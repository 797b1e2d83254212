"""The tables of a config that need no server: model, data, judging, prompts, objective, optimiser, evaluation, run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from scope_opd.config.base import (
    AlarmAction,
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    Table,
    UserPath,
)

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


class LoraConfig(Table):
    """Low-rank adapters: trained in place of the weights. ``rank = 0``: none, the whole student is trained.

    ``alpha``: they are scaled by alpha / rank. ``target_modules``: "all-linear", every linear layer but the head, or
    names of such ("q_proj"). Needs ``pip install 'scope-opd[lora]'``; docs/training.md.
    """

    rank: NonNegativeInt = 0
    alpha: PositiveFloat = 32.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"


class ModelConfig(Table):
    """The student. ``path`` is a Hugging Face folder, a hub id, or ``zoo:student``."""

    path: str = "zoo:student"
    revision: str | None = None
    tokenizer: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    lora: LoraConfig = Field(default_factory=LoraConfig)


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


class ObjectiveConfig(Table):
    """The method and its surrogate. Fields left out take the preset's value, then the method's own, then these.

    ``preset``: "paper", "as_released" or "as_documented" (see ``PRESETS``); None is the paper's formula with truncated
    rollouts ignored. ``aggregation``, ``clip`` and ``dual_clip`` default to what the method declares; "off" is no clip
    whatever it declares.
    ``distill``: the distillation term: the log-ratio of the sampled token ("sampled"), or a divergence of the two
    distributions, over all ids ("full_kl", "jsd": a teacher in process) or over the ``topk`` likeliest ids of the
    teacher and one bucket for the rest ("topk_reverse_kl", "topk_forward_kl"); docs/method.md.
    ``end_token``: how the teacher judges the token that ends a response where its own end tokens are others: as any
    token ("score"), not at all ("exclude"), or as if the teacher's own had been drawn ("map").
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
    distill: Literal["sampled", "topk_reverse_kl", "topk_forward_kl", "full_kl", "jsd"] = "sampled"
    topk: PositiveInt = 64
    end_token: Literal["score", "exclude", "map"] = "score"
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

    @property
    def teacher_topk(self) -> int:
        """How many of the teacher's likeliest ids the distillation term wants of each token; 0 where it wants none."""
        return self.topk if self.distill in ("topk_reverse_kl", "topk_forward_kl") else 0


class TrainConfig(Table):
    """The optimiser and the step.

    ``max_tokens_per_microbatch`` bounds prompt + response tokens (padding included) of one forward and backward pass;
    it changes memory and speed, never the gradient. ``packing``: several rollouts share a row without padding where the
    model's attention can keep them apart (sdpa, flash attention); elsewhere, and with false, rows are padded.
    ``minibatches``: a step's prompts, with all their rollouts, are cut into so many parts, in their order; each is an
    optimiser step with denominators of its own. ``updates_per_batch``: passes over all of them. Where that is several
    optimiser steps, what the policy was before the first is recorded for all rollouts.

    ``param_dtype = "bfloat16"`` is the paper's pure-bf16 training: most updates at small learning rates round to zero
    there; float32 keeps fp32 master weights (bf16 autocast on a GPU).

    ``activation_checkpointing``: which decoder layers the backward pass computes again instead of keeping their
    activations: none ("off"), all ("full"), every n-th (n, at most the number of layers), or all, with their inputs in
    CPU memory until then ("offload"). ``optimizer``: "adamw_8bit" keeps its states in 8 bits (torchao's, the extra
    ``low-bit``); "muon" takes the hidden matrices, AdamW the rest. ``offload = "optimizer"``: AdamW has its states, and
    steps, in CPU memory.
    ``threads``: torch intra-op threads; None leaves torch's choice.

    With several ranks (torchrun) weights, gradients and optimiser states are dealt to all of them (``shard = "full"``),
    or to those of each machine, which then holds a whole copy ("hybrid"). Every optimiser steps on shares: states are
    in 8 bits where every rank's rows of a matrix are whole blocks of 256 values, and Muon gathers one matrix at a time.
    ``collective_timeout_s``: how long a rank waits for the others within an update; generation and judging have no such
    limit.
    """

    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 16
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    offload: Literal["off", "optimizer"] = "off"
    lr: PositiveFloat = 2e-6
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegativeInt = 0
    min_lr_ratio: Share = 0.0
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    grad_clip: PositiveFloat | Literal["off"] = 1.0
    updates_per_batch: PositiveInt = 1
    minibatches: PositiveInt = 1
    max_tokens_per_microbatch: PositiveInt = 16384
    packing: bool = True
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: Literal["off", "full", "offload"] | PositiveInt = "off"
    shard: Literal["full", "hybrid"] = "full"
    collective_timeout_s: PositiveFloat = 600.0
    device: str = "auto"
    threads: Annotated[int, Field(gt=0, le=4096)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _betas_from_toml(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            return {**values, "betas": tuple(values["betas"])}
        return values

    @model_validator(mode="after")
    def _offloads_adamw(self) -> TrainConfig:
        if self.offload != "off" and self.optimizer != "adamw":
            raise ValueError(
                f"train.offload = {self.offload!r} with train.optimizer = {self.optimizer!r}; expected 'adamw', whose "
                f"states alone are offloaded; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_of_prompts(self) -> TrainConfig:
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"train.minibatches = {self.minibatches} with train.prompts_per_step = {self.prompts_per_step}; "
                f"expected at most as many, since a mini-batch holds whole prompts; change one of them"
            )
        return self


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
    ``keep_best``: besides the ``keep_last`` newest, keep the checkpoint of the best evaluation: by Avg@n at the first
    of ``eval.temperatures`` (true), or by a figure ("avg@k", "pass@k/8"; "T1/avg@k" at another temperature).
    ``async_checkpoints``: write them to disk while training goes on; each takes its size in CPU memory meanwhile.
    """

    dir: UserPath = "runs/run"
    seed: Seed = 0
    checkpoint_every: NonNegativeInt = 50
    keep_last: PositiveInt = 2
    keep_best: bool | str = False
    async_checkpoints: bool = True
    rollouts_logged: NonNegativeInt = 16
    export: bool = True
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    project: str = "scope"
    alarms: AlarmsConfig = Field(default_factory=AlarmsConfig)
