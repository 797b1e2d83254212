"""All tables of a run together, and the rules that hold between them."""

from __future__ import annotations

from pydantic import Field, model_validator

from scope_opd.config.base import Table
from scope_opd.config.launch import LaunchConfig
from scope_opd.config.servers import RolloutConfig, ServingConfig, TeacherConfig
from scope_opd.config.tables import (
    ChatConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainConfig,
    VerifyConfig,
)


class Config(Table):
    """All tables of a run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    serving: ServingConfig = Field(default_factory=ServingConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)

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
        if self.teacher.served and self.objective.distill in ("full_kl", "jsd"):
            raise ValueError(
                f"objective.distill = {self.objective.distill!r} with a teacher behind servers; expected 'sampled', "
                "'topk_reverse_kl' or 'topk_forward_kl', since servers give no logits; set one of these, or load the "
                "teacher in process (teacher.path without base_urls)"
            )
        self.best_figure  # noqa: B018 - raises
        return self

    @property
    def best_figure(self) -> tuple[float, str] | None:
        """What ``run.keep_best`` goes by: a temperature, and a figure of its evaluation ("avg@k", "pass@k/8").

        Raises:
            ValueError: no such figure comes out of ``[eval]``.
        """
        wanted, evaluation = self.run.keep_best, self.eval
        if wanted is False:
            return None
        figure = "avg@k" if wanted is True else wanted
        temperature = evaluation.temperatures[0]
        if figure.startswith("T"):
            place, _, figure = figure.partition("/")
            temperature = next((each for each in evaluation.temperatures if f"T{each:g}" == place), -1.0)
        ks = [2**i for i in range(evaluation.n.bit_length())]
        offered = [f"T{each:g}/{name}" for each in evaluation.temperatures
                   for name in ("avg@k", *(f"pass@k/{k}" for k in ks))]  # fmt: skip
        if f"T{temperature:g}/{figure}" not in offered:
            raise ValueError(f"run.keep_best = {wanted!r}; expected true or one of {', '.join(offered)}; change it")
        if not (evaluation.every or evaluation.at_start or evaluation.at_end):
            raise ValueError(f"run.keep_best = {wanted!r} without an evaluation; expected one; set eval.every")
        return temperature, figure
