"""Bad input never gives a traceback: a table of mistakes, each run through the real command line.

Every case must end with its exit code and exactly one ``error:`` line that says what was found, what was expected and
what to do, and must leave every file that was there before as it was.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from scope_opd.cli.main import main
from tiny import save_pair

ROW = '{"id": "a", "group": "g", "correct": true, "logprobs": [-0.5, -0.5]}\n'
GOOD_ROWS = "".join(json.dumps({"id": f"p{i}", "problem": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(4))
TRAIN = (
    "model.path={models}/student", "teacher.path={models}/teacher", "data.train={tmp}/rows.jsonl",
    "data.max_prompt_tokens=64", "rollout.n=2", "rollout.max_tokens=4", "objective.truncated=incorrect",
    "train.steps=1", "train.prompts_per_step=2", "run.dir={tmp}/run", "run.export=false",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
        command: the arguments; ``{tmp}`` and ``{models}`` are filled in.
        words: what the line must contain: found, expected, remedy.
        files: made before, relative to ``{tmp}``; they must still be the same afterwards.
        sets: ``--set`` values of a ``train`` command, on top of ``TRAIN``.
        code: the exit code.
    """

    command: str
    words: tuple[str, ...]
    files: dict[str, str | bytes] = field(default_factory=dict)
    sets: tuple[str, ...] = ()
    code: int = 2


def train(*sets: str, words: tuple[str, ...], code: int = 2, more: str = "", **files: str | bytes) -> Case:
    """A ``scope train`` on sound folders and rows, but for ``sets`` and ``files`` (``rows`` is rows.jsonl)."""
    named = {name.replace("__", "."): content for name, content in files.items()}
    return Case(f"train {{tmp}}/c.toml {more}", words, {"c.toml": "", "rows.jsonl": GOOD_ROWS, **named}, sets, code)


def rows(content: str | bytes, *words: str) -> Case:
    """A ``scope train`` whose rows.jsonl is wrong."""
    return train(words=("rows.jsonl", *words), rows__jsonl=content)


def weights(content: str | bytes, *words: str, options: str = "") -> Case:
    """A ``scope weights`` of a file with this content."""
    return Case(f"weights {{tmp}}/r.jsonl {options}", words, {"r.jsonl": content})


def a_row(**changes: Any) -> str:
    """ROW with fields changed; None takes the field out."""
    row = {**json.loads(ROW), **changes}
    return json.dumps({key: value for key, value in row.items() if value is not None}) + "\n"


CASES: dict[str, Case] = {
    # the command line itself
    "unknown command": Case("trian x.toml", ("unknown command trian", "one of", "did you mean train?")),
    "unknown option": Case("train x.toml --rezume", ("--rezume", "one of", "did you mean --resume?")),
    "unknown option of no command": Case("--verison", ("--verison", "one of", "did you mean --version?")),
    "unknown command of a command": Case("zoo lst", ("unknown command lst", "one of", "did you mean list?")),
    "missing argument": Case("train", ("CONFIG", "expected", "scope train --help")),
    "argument too many": Case("weights a b", ("unexpected argument b", "expected none", "--help")),
    "not a number": Case("weights a --tau much", ("much", "float", "--help")),
    "not a choice": Case("weights a --scale median", ("median", "sum", "--help")),
    "demo of an unknown method": Case("demo --method scop --out {tmp}/demo", ("'scop'", "one of", "mean scope?")),
    "demo of a setting that a method refuses": Case(
        "demo --set objective.distill=full_kl --out {tmp}/demo", ("full_kl", "'grpo'", "a method that distils", "use")
    ),
    # config
    "no such config": Case("train {tmp}/none.toml", ("none.toml", "a TOML config", "check the path")),
    "config is a folder": Case("train {tmp}", ("is a folder", "a TOML config", "name the file")),
    "config is not TOML": Case("train {tmp}/c.toml", ("c.toml", "valid TOML", "line"), {"c.toml": "tau == 1"}),
    "config is not UTF-8": Case("train {tmp}/c.toml", ("c.toml", "UTF-8", "re-save"), {"c.toml": b"# \xff"}),
    "unknown table": Case("train {tmp}/c.toml", ("table trian", "one of", "mean train?"), {"c.toml": "[trian]"}),
    "unknown key": train("objective.tua=1", words=("objective.tua", "one of", "did you mean objective.tau?")),
    "number for a table": train(
        "model.lora=4", words=("model.lora = 4", "a table", "set its keys under [model.lora]")
    ),
    "wrong type": train("train.steps='many'", words=("train.steps = 'many'", "integer", "change train.steps")),
    "tau is zero": train("objective.tau=0", words=("objective.tau = 0", "greater than 0", "change")),
    "tau is negative": train("objective.tau=-1.0", words=("objective.tau = -1.0", "greater than 0", "change")),
    "lr is NaN": train("train.lr=nan", words=("train.lr", "finite", "change")),
    "no steps": train("train.steps=0", words=("train.steps = 0", "greater than 0", "change")),
    "override without a value": train("objective.tau", words=("--set objective.tau", "TABLE.KEY=VALUE", "for example")),
    "top-p in training": train("rollout.top_p=0.9", words=("rollout.top_p = 0.9", "expected 1.0", "remove it")),
    "top-k in training": train("rollout.top_k=20", words=("rollout.top_k = 20", "expected 0", "remove it")),
    "n = 1 with grpo": train(
        "objective.method=grpo", "rollout.n=1", words=("rollout.n = 1", "n >= 2", "raise rollout.n")
    ),
    "unknown method": train("objective.method=scop", words=("'scop'", "one of", "did you mean scope?")),
    "plug-in that is not there": train("objective.plugins=['no_such']", words=("no_such", "importable", "check")),
    "setting that a method has not": train(
        "objective.method_settings={gamma=1}", words=("gamma", "expected", "change [objective]")
    ),
    "exact KL without distillation": train(
        "objective.method=grpo", "objective.distill=full_kl", words=("full_kl", "distils", "sampled")
    ),
    "every n-th of fewer layers": train(
        "train.activation_checkpointing=99",
        words=("train.activation_checkpointing = 99", "the student has 2 layers", "from 1 to 2", "lower it"),
    ),
    "unknown tracker": train("run.trackers=['tensorbored']", words=("run.trackers", "tensorboard", "change")),
    "no such device": train("train.device=abacus", words=("abacus", "cpu", "train.device")),
    **{
        f"device {name}": train(f"train.device={name}", words=(f"device '{name}'", "cpu, cuda", "train.device"))
        for name in ("mps", "meta", "xpu", "cuda:x", "cpu:1")
    },
    "GPU that is not there": train("train.device=cuda:99", words=("cuda:99", "GPUs visible", "use auto or cpu")),
    **{
        f"plug-in with a {kind}": train(
            f"objective.plugins=['scope_test_plugin_{kind}']", words=(f"scope_test_plugin_{kind}", kind, "importable"),
            **{f"scope_test_plugin_{kind}__py": source},
        )
        for kind, source in {
            "ValueError": "raise ValueError('no')", "SyntaxError": "def (", "ZeroDivisionError": "1 / 0",
            "SystemExit": "raise SystemExit(3)",
        }.items()
    },
    "plug-in that takes a method's name": train(
        "objective.plugins=['scope_test_plugin_taken']", words=("'scope' is already registered", "importable", "mend"),
        scope_test_plugin_taken__py="from scope_opd.objective.methods import register, Scope\n"
        "register('scope')(type('Mine', (Scope,), {}))\n",
    ),
    "seed beyond 63 bits": train("run.seed=9223372036854775808", words=("run.seed", "less than", "change run.seed")),
    "seed of 5000 digits": train("run.seed=" + "9" * 5000, words=("run.seed", "integer", "change run.seed")),
    "threads beyond any machine": train("train.threads=999999", words=("train.threads", "4096", "change")),
    "nested override": train("chat.kwargs.x=" + "[" * 9000, words=("chat.kwargs.x", "TABLE.KEY=VALUE", "plain")),
    "config with a long integer": Case(
        "train {tmp}/c.toml", ("c.toml", "plain values", "mend"), {"c.toml": "x = " + "9" * 5000}
    ),
    "nested config": Case("train {tmp}/c.toml", ("c.toml", "plain values", "mend"), {"c.toml": "x = " + "[" * 9000}),
    "evaluation without problems": train("eval.at_end=true", words=("data.eval", "held-out", "set data.eval")),
    # data
    "no such data": train("data.train={tmp}/none.jsonl", words=("none.jsonl", "a data file", "check the path")),
    "data of an unknown kind": train("data.train={tmp}/c.toml", words=("c.toml", ".parquet", "convert")),
    "empty data": rows("", "is empty", "at least one row"),
    "bad JSON": rows(GOOD_ROWS + "{\n", "line 5", "one JSON object a line", "mend"),
    "not UTF-8": rows(b'{"problem": "\xe9"}\n', "line 1", "UTF-8", "re-save"),
    "no such column": rows('{"q": "x", "answer": "1"}\n', "q, answer", "'problem'", "data.problem_column"),
    "problem of a wrong type": rows('{"problem": 1, "answer": "1"}\n', "line 1", "a text", "convert"),
    "empty answer": rows('{"problem": "x", "answer": ""}\n', "line 1", "gold answer", "drop the row"),
    "duplicate ids": rows(GOOD_ROWS * 2, "line 5", "'p0'", "unique", "rename"),
    "too few rows": train("train.prompts_per_step=9", words=("4 rows", "train.prompts_per_step = 9", "add rows")),
    "truncated parquet": train(
        "data.train={tmp}/r.parquet", words=("r.parquet", "complete parquet", "again"), r__parquet=b"PAR1 cut off"
    ),
    "JSON with a long integer": train(
        "data.train={tmp}/r.json", words=("r.json", "plain values", "mend"), r__json="[" + "9" * 5000 + "]"
    ),
    "nested JSON": train(
        "data.train={tmp}/r.json", words=("r.json", "plain values", "mend"), r__json="[" * 100_000
    ),
    "prompt over the limit": train(
        "data.max_prompt_tokens=3", words=("line 1", "'p0'", "data.max_prompt_tokens = 3", "raise it")
    ),
    "prompt and response over the context": train(
        "rollout.max_tokens=250", words=("line 1", "max_tokens = 250", "256, the context of the student", "lower")
    ),
    "response over the teacher's context": train(
        "teacher.path={models}/short", "rollout.max_tokens=40",
        words=("line 1", "max_tokens = 40", "48, the context of the teacher", "lower"),
    ),
    "evaluation over the context": train(
        "eval.at_end=true", "data.eval={tmp}/rows.jsonl", "eval.max_tokens=250",
        words=("max_tokens = 250", "256, the context", "eval.max_tokens"),
    ),
    "no such template": train("chat.template={tmp}/t.jinja", words=("t.jinja", "a Jinja file", "check the path")),
    "template that is not Jinja": train(
        "chat.template={tmp}/t.jinja", words=("template", "line 1", "mend"), t__jinja="{% if %}"
    ),
    "system message for a bare prompt": train(
        "chat.template=none", "chat.system=Hello", words=("chat.system", "a template", "remove")
    ),
    "tokenizer without a chat template": train(
        "model.path={models}/plain", words=("no chat template", "expected", "chat.template")
    ),
    # models
    "no such folder": train("model.path={tmp}/none", words=("none", "folder", "check the path")),
    "folder without weights": train("model.path={models}/bare", words=("no weights", "model.safetensors", "copy")),
    "damaged weights": train("model.path={models}/damaged", words=("damaged", "whole safetensors", "copy it again")),
    "folder without a tokenizer": train("model.path={models}/mute", words=("tokenizer", "tokenizer.json", "save")),
    "folder without a config": train("model.path={models}/blank", words=("config.json", "model folder", "check")),
    "unknown model of the zoo": train("model.path=zoo:pupil", words=("zoo:pupil", "zoo:student", "choose")),
    "vocabularies that differ": train(
        "teacher.path={models}/foreign", words=("mean different tokens", "expected", "student's vocabulary")
    ),
    "end token outside the vocabulary": train(
        "chat.stop_token_ids=[999]", words=("end token 999", "below the model's 320", "chat.stop_token_ids")
    ),
    # the run
    "occupied run folder": train(
        words=("run", "not empty", "new or empty", "--resume"), **{"run/metrics__jsonl": "{}\n"}
    ),
    "run folder under a file": train(
        "run.dir={tmp}/c.toml/run", words=("c.toml/run", "can be written", "choose another run.dir")
    ),
    "resume of what is no run": train(
        words=("holds no run", "run.json", "check run.dir"), more="--resume", **{"run/notes__txt": "mine"}
    ),
    "weights that are NaN": train("model.path={models}/nan", words=("NaN", "finite", "weights"), code=1),
    "loss that explodes": train(
        "train.lr=1e30", "train.steps=9", words=("alarm nan", "not finite", "--resume"), code=1
    ),
    "teacher that is NaN": train("teacher.path={models}/nan", words=("teacher", "NaN", "finite"), code=1),
    # scope weights
    "no such rollouts": Case("weights {tmp}/none.jsonl", ("none.jsonl", "a JSONL file", "check the path")),
    "no rollouts": weights("", "r.jsonl", "one JSON object a line", "check"),
    "rollout that is no object": weights("[1]\n", "r.jsonl line 1", "JSON object", "one object a line"),
    "NaN log-prob": weights(ROW.replace("-0.5]", "NaN]"), "line 1", "NaN", "finite"),
    "infinite log-prob": weights(ROW.replace("-0.5]", "-1e999]"), "line 1", "'a'", "finite log-prob"),
    "positive log-prob": weights(a_row(logprobs=[-1, 0.5]), "line 1", "'a'", "0.5", "<= 0"),
    "empty log-probs": weights(a_row(logprobs=[]), "line 1", "'a'", "empty", "one log-prob a response token"),
    "lengths that differ": weights(a_row(teacher_logprobs=[-1.0]), "line 1", "'a'", "1 teacher_logprobs and 2"),
    "no group": weights(a_row(group=None), "line 1", "'a'", "group", "add it"),
    "no log-probs": weights(a_row(logprobs=None), "line 1", "'a'", "logprobs", "add it"),
    "no verdict field": weights(a_row(correct=None), "line 1", "'a'", "correct", "add it"),
    "verdict of a wrong type": weights(a_row(correct="yes"), "line 1", "'a'", "'yes'", "true or false"),
    "two rollouts of an id": weights(ROW + ROW, "line 2", "'a'", "line 1", "unique", "rename"),
    "bad row after good ones": weights(ROW + a_row(id="b", logprobs=["x"]), "line 2", "'b'", "finite log-prob"),
    "rollouts that are not UTF-8": weights(b'{"id": "\xff"}\n', "r.jsonl", "line 1", "UTF-8", "re-save"),
    "weights with tau = 0": weights(ROW, "--tau = 0", "greater than 0", "change --tau", options="--tau 0"),
    "weights with a NaN threshold": weights(
        ROW, "--reward-threshold", "finite", "change", options="--reward-threshold nan"
    ),
    "log-probs beyond any number": weights(a_row(logprobs=[-9999.0]), "'a'", "-700", "floor"),
    # the others
    "report of nothing": Case("report", ("no run folder", "at least one", "scope report")),
    "report of no such folder": Case("report {tmp}/none", ("none", "a run folder", "check the path")),
    "report of no run": Case("report {tmp}", ("not a run folder", "scope train", "check"), {"notes.txt": "mine"}),
    "demo over somebody's files": Case(
        "demo --out {tmp}", ("not empty", "a new or empty folder", "--out"), {"notes.txt": "mine"}
    ),
    "demo over a file": Case("demo --out {tmp}/f", ("is a file", "a folder", "--out"), {"f": "mine"}),
    "demo without seeds": Case("demo --seeds 0", ("--seeds 0", "at least 1", "leave it out")),
    "zoo over somebody's files": Case("zoo copy {tmp}", ("exists", "empty", "name another"), {"notes.txt": "mine"}),
    "plan for no GPU": Case("plan {tmp}/c.toml --gpus 0", ("--gpus 0", "from 1", "change --gpus"), {"c.toml": ""}),
    "plan without memory": Case(
        "plan {tmp}/c.toml --gpu-memory 0", ("--gpu-memory 0", "GB above 0", "change"), {"c.toml": ""}
    ),
    "plan with all memory reserved": Case(
        "plan {tmp}/c.toml --gpu-memory 2", ("--reserve 2", "less than --gpu-memory 2", "change"), {"c.toml": ""}
    ),
    "export of a step below 0": Case("export {tmp} --step -1 --out {tmp}/o", ("--step -1", "from 0", "name the step")),
    "export over a file": Case("export {tmp} --out {tmp}/f", ("f is a file", "not exist yet", "choose"), {"f": "mine"}),
    "export under a file": Case(
        "export {tmp} --out {tmp}/f/o", ("o is under a file", "can be made", "choose"), {"f": "mine"}
    ),
    "doctor of a bad config": Case("doctor {tmp}/c.toml", ("trian", "one of", "mean train?"), {"c.toml": "[trian]"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound and broken model folders."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("student", "teacher", "bare", "damaged", "mute", "plain", "foreign", "nan", "blank"):
        save_pair(folder / name)
    save_pair(folder / "short", context=48)
    (folder / "bare" / "model.safetensors").unlink()
    (folder / "blank" / "config.json").unlink()
    damaged = folder / "damaged" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    for file in (folder / "mute").glob("*token*"):
        file.unlink()
    plain = AutoTokenizer.from_pretrained(folder / "plain")
    plain.chat_template = None
    (folder / "plain" / "chat_template.jinja").unlink()
    plain.save_pretrained(folder / "plain")
    swapped = json.loads((folder / "foreign" / "tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    vocabulary[names[-1]], vocabulary[names[-2]] = vocabulary[names[-2]], vocabulary[names[-1]]
    Tokenizer.from_str(json.dumps(swapped))
    (folder / "foreign" / "tokenizer.json").write_text(json.dumps(swapped))
    weights_file = folder / "nan" / "model.safetensors"
    tensors = load_file(weights_file)
    save_file(
        {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, weights_file, {"format": "pt"}
    )
    return folder


def fingerprints(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_one_error_line(stderr: str, words: tuple[str, ...]) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in errors[0]
    assert stderr.splitlines()[-1] == errors[0]


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES, ids=str)
def test_a_mistake_is_one_line_and_loses_nothing(
    name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    for path, content in case.files.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = fingerprints(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = case.command.split()
    if case.command.startswith("train {tmp}/c.toml"):
        arguments += [part for value in (*TRAIN, *case.sets) for part in ("--set", value)]
    arguments = [argument.replace("{tmp}", str(tmp_path)).replace("{models}", str(models)) for argument in arguments]

    code = main(arguments)

    captured = capsys.readouterr()
    assert code == case.code
    assert_one_error_line(captured.err, tuple(word.replace("{tmp}", str(tmp_path)) for word in case.words))
    assert captured.out == ""
    after = fingerprints(tmp_path)
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ..."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_memory_ends_a_run_with_one_line(
    error: Exception, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("scope_opd.train.loop.train", full)
    (tmp_path / "rows.jsonl").write_text(GOOD_ROWS)
    (tmp_path / "c.toml").write_text("")
    sets = [part for value in TRAIN for part in ("--set", value)]
    sets = [value.replace("{tmp}", str(tmp_path)).replace("{models}", str(models)) for value in sets]
    assert main(["train", str(tmp_path / "c.toml"), *sets]) == 1
    assert_one_error_line(capsys.readouterr().err, ("out of memory", "a step that fits", "lower"))


def test_a_run_folder_that_cannot_be_made_is_refused_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text("")
    assert main(["train", str(tmp_path / "c.toml"), "--run-dir", str(tmp_path / "c.toml" / "run")]) == 2
    stderr = capsys.readouterr().err
    assert_one_error_line(stderr, ("c.toml/run", "can be written", "choose another run.dir"))
    assert "loading" not in stderr


def test_a_full_disk_ends_a_run_with_one_line(models: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "rows.jsonl").write_text(GOOD_ROWS)
    (tmp_path / "c.toml").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "rollouts.jsonl").symlink_to("/dev/full")
    sets = [part for value in TRAIN for part in ("--set", value)]
    sets = [value.replace("{tmp}", str(tmp_path)).replace("{models}", str(models)) for value in sets]
    done = subprocess.run(
        [sys.executable, "-m", "scope_opd", "train", str(tmp_path / "c.toml"), "--resume", *sets],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert_one_error_line(done.stderr, ("rollouts.jsonl", "No space left", "--resume"))


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "r.jsonl").write_text(ROW)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "scope_opd", "weights", str(tmp_path / "r.jsonl")],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert_one_error_line(done.stderr, ("No space left",))


def test_an_interrupt_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scope_opd.config.load_config", interrupted)
    assert main(["train", str(tmp_path / "c.toml")]) == 130
    assert_one_error_line(capsys.readouterr().err, ("interrupted",))
