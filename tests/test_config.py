"""The config: strict tables, presets, overrides, rules between tables, and mistakes in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.config import PRESETS, Config, Table, load_config, validate_config
from scope_opd.errors import ConfigError
from scope_opd.objective.methods import build_method, method_names

LAW = settings(max_examples=40, deadline=None, derandomize=True)


def tables_of(model: type[Table], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Table):
            found += tables_of(field.annotation, (*path, name))
    return found


def test_defaults_are_valid_and_are_the_papers_formula_with_truncated_ignored() -> None:
    objective = validate_config({}).objective
    assert (objective.method, objective.tau, objective.student_weight, objective.teacher_weight, objective.scale) == (
        "scope", 1.0, "ppl", "inverse_ppl", "sum"
    )  # fmt: skip
    assert (objective.truncated, objective.temperature, objective.distill) == ("ignore", "matched", "sampled")
    assert objective.reference_kl == 0.0
    assert build_method(objective.method, objective.model_dump()).aggregation == "prompt"


# Student weight, teacher weight, scale, aggregation (None: the method's), temperatures, truncated: as published and as
# released.
PRESET_TABLE = {
    "paper": ("ppl", "inverse_ppl", "sum", None, "matched", "incorrect"),
    "as_released": ("inverse_ppl", "inverse_ppl", "mean", "released", "released", "incorrect"),
    "as_documented": ("inverse_ppl", "ppl", "mean", "released", "released", "incorrect"),
}


@pytest.mark.parametrize("preset", sorted(PRESET_TABLE))
def test_preset_sets_what_it_is_published_with(preset: str) -> None:
    o = validate_config({"objective": {"preset": preset}}).objective
    got = (o.student_weight, o.teacher_weight, o.scale, o.aggregation, o.temperature, o.truncated)
    assert got == PRESET_TABLE[preset]
    assert set(PRESETS) == set(PRESET_TABLE)


@pytest.mark.parametrize("name", method_names())
def test_the_papers_preset_leaves_every_method_its_own_aggregation(name: str) -> None:
    assert validate_config({"objective": {"preset": "paper", "method": name}}).objective.aggregation is None


def test_a_wrong_clip_counts_as_one_mistake_among_others() -> None:
    with pytest.raises(ConfigError, match=r"change objective\.clip \(1 more after this one\)"):
        validate_config({"objective": {"clip": "of"}, "train": {"grad_clip": -1}})


def test_off_is_a_clip() -> None:
    config = load_config(None, ["objective.clip=off", "objective.dual_clip=off", "train.grad_clip=off"])
    assert (config.objective.clip, config.objective.dual_clip, config.train.grad_clip) == ("off", "off", "off")


@pytest.mark.parametrize("preset", sorted(PRESET_TABLE))
def test_a_field_that_is_given_wins_over_the_preset(preset: str) -> None:
    given_ = {"preset": preset, "student_weight": "uniform", "truncated": "ignore", "aggregation": "token"}
    o = validate_config({"objective": given_}).objective
    assert (o.student_weight, o.truncated, o.aggregation) == ("uniform", "ignore", "token")
    assert o.teacher_weight == PRESET_TABLE[preset][1]


@pytest.mark.parametrize("path", tables_of(Config), ids=".".join)
def test_every_table_refuses_an_unknown_key_and_names_the_nearest(path: tuple[str, ...]) -> None:
    model: Any = Config
    for name in path:
        model = model.model_fields[name].annotation
    known = sorted(model.model_fields)[0]
    wrong = known + "x"
    values: dict[str, Any] = {wrong: {}}
    for name in reversed(path):
        values = {name: values}
    dotted = ".".join([*path, wrong])
    with pytest.raises(
        ConfigError, match=f"unknown (key|table) {dotted}; expected one of .*did you mean {dotted[:-1]}"
    ):
        validate_config(values)


@pytest.mark.parametrize(
    ("table", "key", "nearest"),
    [("objective", "teu", "tau"), ("train", "learning_rate", "train."), ("rollout", "temprature", "temperature"),
     ("eval", "problem", "problems"), ("run", "seeed", "seed")],
)  # fmt: skip
def test_a_misspelt_key_is_met_with_the_right_one(table: str, key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key {table}.{key}; .*did you mean .*{nearest}"):
        validate_config({table: {key: 1}})


WRONG: list[tuple[str, Any, str]] = [
    ("objective.tau", 0, "objective.tau = 0; expected greater than 0"),
    ("objective.tau", -1.0, "objective.tau = -1.0"),
    ("objective.tau", math.nan, "objective.tau = nan"),
    ("objective.tau", math.inf, "objective.tau = inf"),
    ("objective.tau", "1", "objective.tau = '1'; expected a number"),
    ("objective.tau", True, "objective.tau = True"),
    ("objective.tau", None, "objective.tau = None"),
    ("objective.preset", "papr", "objective.preset = 'papr'; expected 'paper', 'as_released' or 'as_documented'"),
    ("objective.preset", ["paper"], "objective.preset"),
    ("objective.student_weight", "up", "expected 'ppl', 'uniform' or 'inverse_ppl'"),
    ("objective.scale", "max", "expected 'sum' or 'mean'"),
    ("objective.truncated", "wrong", "expected 'ignore' or 'incorrect'"),
    ("objective.aggregation", "mean", "objective.aggregation = 'mean'"),
    ("objective.temperature", "tempered", "expected 'matched', 'released' or 'raw'"),
    ("objective.reward_threshold", math.nan, "objective.reward_threshold = nan; expected a finite number"),
    ("objective.clip", 0.0, "objective.clip = 0.0; expected greater than 0 or 'off'; change objective.clip$"),
    ("objective.clip", "of", "objective.clip = 'of'; expected a number or 'off'; change objective.clip$"),
    ("objective.clip", True, "objective.clip = True; expected a number or 'off'"),
    ("objective.dual_clip", 1.0, "objective.dual_clip = 1.0; expected greater than 1 or 'off'"),
    ("objective.dual_clip", math.inf, "objective.dual_clip = inf; expected a finite number or 'off'"),
    ("train.grad_clip", None, "train.grad_clip = None; expected a number or 'off'"),
    ("objective.sampler_correction_cap", 0, "objective.sampler_correction_cap = 0"),
    ("objective.reference_kl", -1e-4, "objective.reference_kl"),
    ("objective.beta", -1, "objective.beta = -1"),
    ("rollout.n", 0, "rollout.n = 0; expected greater than 0"),
    ("rollout.n", 1.5, "rollout.n = 1.5; expected an integer"),
    ("rollout.n", "8", "rollout.n = '8'"),
    ("rollout.temperature", 0.0, "rollout.temperature = 0.0"),
    ("rollout.top_p", 0.0, "rollout.top_p"),
    ("rollout.max_tokens", 0, "rollout.max_tokens = 0"),
    ("teacher.log_prob_floor", 0.0, "teacher.log_prob_floor = 0.0; expected less than 0"),
    ("teacher.dtype", "float16", "teacher.dtype = 'float16'"),
    ("train.lr", 0, "train.lr = 0"),
    ("train.steps", 0, "train.steps = 0"),
    ("train.betas", [0.9], "train.betas"),
    ("train.betas", [0.9, 1.0], r"train.betas.1 = 1.0; expected less than 1"),
    ("train.betas", [0.9, 0.99, 0.999], "expected a list of at most 2 elements; change train.betas$"),
    ("train.optimizer", "sgd", "expected 'adamw', 'adamw_8bit' or 'muon'"),
    ("train.activation_checkpointing", "on", "= 'on'; expected 'off', 'full', 'offload' or an integer; change train"),
    ("train.activation_checkpointing", 0, "train.activation_checkpointing = 0"),
    ("train.activation_checkpointing", True, "train.activation_checkpointing = True"),
    ("train.gradient_checkpointing", True, "did you mean train.activation_checkpointing"),
    ("train.offload", "weights", "train.offload = 'weights'; expected 'off' or 'optimizer'"),
    ("model.lora.rank", -1, "model.lora.rank = -1; expected greater than or equal to 0"),
    ("model.lora.alpha", 0.0, "model.lora.alpha = 0.0; expected greater than 0"),
    ("model.lora.target_modules", [], r"= \[\]; expected 'all-linear' or a list of at least 1 element; change model"),
    ("model.lora.target_modules", [3], r"= \[3\]; expected 'all-linear' or a list of strings; change model"),
    ("model.lora", 4, r"model.lora = 4; expected a table; set its keys under \[model.lora\]$"),
    ("model.trust_remote_code", 1, "model.trust_remote_code = 1; expected true or false; change model"),
    ("teacher.routes", {"math": 1}, r"teacher.routes.math = 1; expected a table; set its keys under"),
    ("launch.samplers", ["a"], r"launch.samplers = \['a'\]; expected an integer or a list of integers; change"),
    ("launch.trainer", 0, "launch.trainer = 0; expected greater than 0 or a list; change launch.trainer"),
    ("launch.ports", 80, "launch.ports = 80; expected greater than or equal to 1024 or 'auto'; change launch.ports"),
    ("launch.ray.workers", "2", "launch.ray.workers = '2'; expected an integer; change launch.ray.workers"),
    ("launch.ray.resources", 1, "launch.ray.resources = 1; expected a table; set its keys under"),
    ("objective.distill", "kl", "expected 'sampled', 'topk_reverse_kl', 'topk_forward_kl', 'full_kl' or 'jsd'"),
    ("objective.topk", 0.5, "objective.topk = 0.5; expected an integer; change objective.topk"),
    ("train.packing", "yes", "train.packing = 'yes'; expected true or false; change train.packing"),
    ("run.keep_best", 4, "run.keep_best = 4; expected true, false or a string; change run.keep_best"),
    ("run.keep_best", "accuracy", "= 'accuracy'; expected true or one of T0.6/avg@k, T0.6/pass@k/1, .*; change it$"),
    ("run.seed", "9" * 5000, r"run.seed = '9+ \.\.\. \(5002 characters\); expected an integer; change run.seed"),
    ("model.lora.dropout", 0.1, "unknown key model.lora.dropout; expected one of alpha, rank, target_modules"),
    ("train.grad_clip", 0.0, "train.grad_clip = 0.0"),
    ("eval.temperatures", [], r"eval.temperatures = \[\]; expected a list of at least 1 element; change eval"),
    ("eval.temperatures", [0.6, 0.0], r"eval.temperatures.1 = 0.0; expected greater than 0"),
    ("eval.top_p", 1.1, "eval.top_p = 1.1"),
    ("run.seed", -1, "run.seed = -1"),
    ("run.seed", 2**63, "run.seed = 9223372036854775808; expected less than 9223372036854775808"),
    ("run.trackers", ["mlflow"], r"run.trackers.0 = 'mlflow'"),
    ("run.alarms.nan", "halt", "run.alarms.nan = 'halt'; expected 'off', 'warn' or 'stop'"),
    ("run.alarms.truncation_share", 1.5, "run.alarms.truncation_share = 1.5"),
    ("model.path", 3, "model.path = 3; expected a string"),
    ("chat.stop_token_ids", ["<eos>"], "chat.stop_token_ids.0 = '<eos>'; expected an integer"),
    ("objective", 3, r"objective = 3; expected a table; set its keys under \[objective\]"),
    ("run.alarms", [], r"run.alarms = \[\]"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_value_is_one_line_with_what_was_found_and_expected(name: str, value: Any, message: str) -> None:
    nested: Any = value
    for key in reversed(name.split(".")):
        nested = {key: nested}
    with pytest.raises(ConfigError, match=message) as caught:
        validate_config(nested)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_further_mistakes_are_counted() -> None:
    with pytest.raises(ConfigError, match="2 more after this one"):
        validate_config({"objective": {"tau": 0}, "rollout": {"n": 0}, "train": {"lr": 0}})


def test_whole_numbers_serve_where_fractions_are_asked_for() -> None:
    config = validate_config({"objective": {"tau": 2}, "train": {"betas": [0, 0.5]}})
    assert config.objective.tau == 2
    assert config.train.betas == (0, 0.5)


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.95), ("top_k", 20), ("repetition_penalty", 1.08)])
def test_training_on_a_cut_or_penalised_distribution_is_refused_and_evaluation_is_not(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"rollout.{name} = {value}; expected .*importance ratio; remove it"):
        validate_config({"rollout": {name: value}})
    assert getattr(validate_config({"eval": {name: value}}).eval, name) == value


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("preset", [None, *sorted(PRESETS)])
def test_every_method_is_built_from_every_valid_objective_table(name: str, preset: str | None) -> None:
    objective = validate_config({"objective": {"method": name, "preset": preset, "tau": 0.5}}).objective
    method = build_method(name, objective.model_dump())
    assert getattr(method, "tau", 0.5) == 0.5


def test_a_toml_file_is_read_and_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[objective]\npreset = "as_released"\ntau = 2.0\n[train]\nsteps = 7\nbetas = [0.9, 0.95]\n')
    config = load_config(path)
    assert (config.objective.tau, config.train.steps, config.train.betas) == (2.0, 7, (0.9, 0.95))
    overrides = ["objective.tau=0.5", "train.steps = 20", "run.dir=runs/tau half", "run.alarms.nan=warn",
                 "eval.temperatures=[0.6, 1.0]", 'chat.suffix="=x"', "chat.kwargs.enable_thinking=false"]  # fmt: skip
    config = load_config(path, overrides)
    assert (config.objective.tau, config.train.steps, config.run.dir) == (0.5, 20, "runs/tau half")
    assert (config.run.alarms.nan, config.eval.temperatures, config.chat.suffix) == ("warn", [0.6, 1.0], "=x")
    assert config.chat.kwargs == {"enable_thinking": False}
    assert config.objective.student_weight == "inverse_ppl"  # of the preset, still


def test_a_preset_given_as_an_override_leaves_what_the_file_says() -> None:
    config = load_config(None, ["objective.preset=as_documented", "objective.scale=sum"])
    assert (config.objective.teacher_weight, config.objective.scale) == ("ppl", "sum")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.tau", "--set objective.tau; expected TABLE.KEY=VALUE"),
        ("tau=1", "--set tau=1; expected TABLE.KEY=VALUE"),
        (".tau=1", "expected TABLE.KEY=VALUE"),
        ("objective..tau=1", "expected TABLE.KEY=VALUE"),
        ("", "expected TABLE.KEY=VALUE"),
        ("objective.tau=", "objective.tau = ''"),
        ("objective.tau=half", "objective.tau = 'half'; expected a number"),
        ("objective.tau.x=1", "objective.tau"),
        ("objektive.tau=1", "unknown table objektive; .*did you mean objective"),
        ("objective.tauu=1", "unknown key objective.tauu; .*did you mean objective.tau"),
        ("train.lr=nan", "train.lr = nan"),
        ("run.dir=2026-01-01", "run.dir"),
    ],
)
def test_a_wrong_override_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_overrides_do_not_reach_through_a_value_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("objective = 3\n")
    with pytest.raises(ConfigError, match="objective is not a table"):
        load_config(path, ["objective.tau=1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[objective\n", r"run\.toml: .*; expected valid TOML"),
        (b"[objective]\ntau = 1\ntau = 2\n", r"run\.toml: .*expected valid TOML"),
        (b"[objective]\ntau = \xff\n", "byte 18 is not UTF-8"),
    ],
)
def test_a_file_that_is_not_toml_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: no such file"):
        load_config(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


@LAW
@given(st.floats(1e-6, 1e6), st.integers(1, 64), st.sampled_from([None, *sorted(PRESETS)]))
def test_a_resolved_config_validates_again_to_itself(tau: float, n: int, preset: str | None) -> None:
    config = validate_config({"objective": {"tau": tau, "preset": preset}, "rollout": {"n": n}})
    assert validate_config(config.model_dump()) == config


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["run.dir", "data.train", "data.eval", "chat.template"]
    (tmp_path / "own.toml").write_text("")
    config = load_config("~/own.toml", [f"{name}=~/{name}" for name in names])
    found = [config.run.dir, config.data.train, config.data.eval, config.chat.template]
    assert found == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize(
    ("keep_best", "found"),
    [
        (False, None),
        (True, (0.6, "avg@k")),
        ("avg@k", (0.6, "avg@k")),
        ("pass@k/4", (0.6, "pass@k/4")),
        ("T1/avg@k", (1.0, "avg@k")),
        ("T0.6/pass@k/1", (0.6, "pass@k/1")),
    ],
)
def test_the_best_is_known_by_a_figure_that_evaluation_gives(keep_best: bool | str, found: Any) -> None:
    values = {"eval": {"every": 5, "n": 6, "temperatures": [0.6, 1.0]}, "run": {"keep_best": keep_best}}
    assert validate_config(values).best_figure == found


@pytest.mark.parametrize("keep_best", ["T2/avg@k", "pass@k/3", "pass@k/8", "nll", "avg", "T/avg@k"])
def test_a_best_by_no_such_figure_is_refused(keep_best: str) -> None:
    values = {"eval": {"every": 5, "n": 6, "temperatures": [0.6, 1.0]}, "run": {"keep_best": keep_best}}
    with pytest.raises(ConfigError, match=r"keep_best"):
        validate_config(values)


def test_a_best_without_an_evaluation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"keep_best = True without an evaluation"):
        validate_config({"run": {"keep_best": True}})
