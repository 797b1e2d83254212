"""Laws of end tokens: what the teacher is asked, and what is left out, where it ends responses with other tokens."""

from __future__ import annotations

import asyncio
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fault_server import MODEL, FaultServer, Table
from scope_opd.cli.ends import judge_ends, own_end, served_ends
from scope_opd.cli.engines import build_engines
from scope_opd.cli.inputs import teacher_tokenizer
from scope_opd.cli.main import main
from scope_opd.config import Config, load_config, validate_config
from scope_opd.credit import assign_credit, judged_tokens, student_nll, teacher_nll
from scope_opd.errors import DataError, ModelError
from scope_opd.models.rows import stack
from scope_opd.objective.methods import build_method
from scope_opd.records import rollout_from_dict, rollout_to_dict
from scope_opd.report.load import _perplexity
from scope_opd.report.viewer import _advantages
from scope_opd.teacher.ends import EndTokens
from scope_opd.teacher.local import LocalTeacher
from scope_opd.train.batch import make_batch
from scope_opd.train.loop import train
from scope_opd.train.metrics import _judged
from scope_opd.train.step import Learner
from scope_opd.types import Rollout
from teacher_kit import teacher_of
from tiny import END_ID, EOS_ID, save_pair, tiny_model, tiny_tokenizer
from train_kit import make_config, make_engines

OTHER = 9
"""An end token of the student's alone."""


def rollout(tokens: list[int], name: str = "r", **values: Any) -> Rollout:
    return Rollout(name, "p", [5, 6, 7], tokens, [-1.0] * len(tokens), **values)


def ends(rule: Any) -> EndTokens:
    return EndTokens(rule, student=(OTHER, EOS_ID), teacher=(EOS_ID, END_ID), own=END_ID)


class TestWhatTheTeacherIsAsked:
    @pytest.mark.parametrize("rule", ["map", "exclude"])
    def test_only_a_last_token_that_ends_for_the_student_alone_is_replaced(self, rule: str) -> None:
        rule_of = ends(rule)
        assert rule_of.scored(rollout([4, OTHER, 8, OTHER])) == [4, OTHER, 8, END_ID]
        assert rule_of.mask(rollout([4, OTHER, 8, OTHER])) == (None if rule == "map" else [1, 1, 1, 0])
        for tokens, reason in (([4, EOS_ID], "stop"), ([4, OTHER], "length"), ([4, 8], "stop"), ([], "stop")):
            same: Any = rollout(tokens, finish_reason=reason)
            assert rule_of.scored(same) == tokens
            assert rule_of.mask(same) is None

    @pytest.mark.parametrize("rule", ["map", "exclude"])
    def test_in_process_and_by_servers_the_place_has_the_log_prob_of_the_teachers_own_end(self, rule: str) -> None:
        model = tiny_model("llama", seed=2)
        table = Table(model)
        rollouts = [
            rollout([4, 8, OTHER], "a"),
            rollout([4, 8, 11], "b", finish_reason="length"),
            rollout([OTHER], "c"),
        ]
        local = asyncio.run(LocalTeacher(model, ends=ends(rule)).score(rollouts))
        with FaultServer(table) as server, teacher_of(server.url, ends=ends(rule)) as teacher:
            served = asyncio.run(teacher.score(rollouts))
        expected = [table.logprobs([5, 6, 7, 4, 8, END_ID])[2:], table.logprobs([5, 6, 7, 4, 8, 11])[2:],
                    table.logprobs([5, 6, 7, END_ID])[2:]]  # fmt: skip
        masks = [None, None, None] if rule == "map" else [[1, 1, 0], None, [0]]
        for scores in (local, served):
            assert [score.logprobs for score in scores] == [pytest.approx(each, abs=1e-5) for each in expected]
            assert [score.mask for score in scores] == masks

    def test_a_token_that_is_excluded_is_not_counted_as_floored(self) -> None:
        model, one = tiny_model("llama", seed=2), rollout([4, OTHER])
        values = Table(model).logprobs([5, 6, 7, 4, END_ID])[2:]
        floor = min(values) / 2
        for rule, count in (("map", sum(v < floor for v in values)), ("exclude", int(values[0] < floor))):
            with FaultServer(Table(model)) as server:
                (found,) = asyncio.run(LocalTeacher(model, log_prob_floor=floor, ends=ends(rule)).score([one]))
                with teacher_of(server.url, ends=ends(rule), log_prob_floor=floor) as teacher:
                    (served,) = asyncio.run(teacher.score([one]))
            assert found.floored == served.floored == count

    def test_an_end_token_without_a_row_in_the_teacher_can_still_be_scored(self) -> None:
        model, foreign = tiny_model("llama", seed=2, vocab_size=300), 310
        one = rollout([4, foreign])
        (unscored,) = asyncio.run(LocalTeacher(model).score([one]))
        assert unscored.logprobs is None
        teacher = LocalTeacher(model, ends=EndTokens("exclude", (foreign,), (EOS_ID,), EOS_ID))
        (score,) = asyncio.run(teacher.score([one]))
        assert score.logprobs is not None
        assert score.mask == [1, 0]
        hidden = teacher.response_hidden(stack([[5, 6, 7, 4, foreign]], packed=True), torch.tensor([[0, 3], [0, 4]]))
        assert hidden.isfinite().all()


class TestWhatIsLeftOut:
    def test_nll_of_the_teacher_is_the_mean_over_what_it_judges(self) -> None:
        one = rollout([4, 8, OTHER], teacher_logprobs=[-1.0, -3.0, -8.0])
        assert teacher_nll(one) == 4.0
        one.teacher_mask = [1, 1, 0]
        assert teacher_nll(one) == 2.0
        assert student_nll(one) == 1.0
        one.loss_mask = [0, 1, 1]
        assert judged_tokens(one) == [0, 1, 0]
        assert teacher_nll(one) == 3.0

    def test_weights_of_the_teacher_path_come_from_what_it_judges(self) -> None:
        # NLL_T is 2 and 3 without the end tokens (4 and 5/3 with them): the weights are softmax(-2, -3).
        pair = [
            rollout([4, 8, OTHER], "a", teacher_logprobs=[-1.0, -3.0, -8.0], teacher_mask=[1, 1, 0], correct=False),
            rollout([4, OTHER], "b", teacher_logprobs=[-3.0, -1 / 3], teacher_mask=[1, 0], correct=False),
        ]
        assign_credit(pair, build_method("scope", {}), truncated="ignore", reward_threshold=0.5)
        assert pair[0].distill == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-12)
        assert pair[1].distill == pytest.approx(1 / (1 + math.e), abs=1e-12)

    def test_a_response_of_an_excluded_token_alone_is_unscored(self) -> None:
        one = rollout([OTHER], teacher_logprobs=[-2.0], teacher_mask=[0], correct=False)
        other = rollout([4, OTHER], "s", teacher_logprobs=[-2.0, -1.0], teacher_mask=[1, 0], correct=False)
        assign_credit([one, other], build_method("scope", {}), truncated="ignore", reward_threshold=0.5)
        assert (one.masked, one.mask_reason, one.distill) == (True, "unscored", 0.0)
        assert other.distill == 1.0

    def test_distillation_is_zero_there_and_reinforcement_stays(self) -> None:
        one = rollout([4, 8, OTHER], teacher_logprobs=[-1.0, -3.0, -8.0], teacher_mask=[1, 1, 0])
        one.reinforce, one.distill = 2.0, 3.0
        other = rollout([4, OTHER], "s", teacher_logprobs=[-1.0, -3.0])
        other.reinforce, other.distill = 1.0, 0.5
        for cut in (None, [[1], [0]]):
            batch = make_batch([one, other], aggregation="token", max_tokens=100, cut=cut)
            found = {
                (int(owner), int(place)): (float(a), float(b), float(c), float(d))
                for micro in batch.micro
                for owner, place, a, b, c, d in zip(micro.rollout, micro.place, micro.reinforce, micro.distill,
                                                    micro.credit_reinforce, micro.credit_distill, strict=True)
            }  # fmt: skip
            # The denominators are those of all five tokens: what is left out costs the others nothing.
            assert found[0, 0] == found[0, 1] == pytest.approx((0.4, 0.6, 2.0, 3.0))
            assert found[0, 2] == pytest.approx((0.4, 0.0, 2.0, 0.0))
            assert found[1, 0] == found[1, 1] == pytest.approx((0.2, 0.1, 1.0, 0.5))

    @pytest.mark.parametrize("distill", ["sampled", "full_kl", "topk_forward_kl"])
    def test_the_loss_is_that_without_the_masked_tokens_distillation(self, distill: str, tmp_path: Path) -> None:
        config = make_config(tmp_path, objective={"truncated": "incorrect", "distill": distill})
        learner = Learner(make_engines(config, dtype=torch.float64), config.train)
        one = rollout([4, 8, OTHER], teacher_logprobs=[-1.0, -3.0, -8.0])
        one.reinforce, one.distill = 0.0, 1.0

        def gradient(**changes: Any) -> torch.Tensor:
            for name, value in changes.items():
                setattr(one, name, value)
            batch = make_batch([one], aggregation="prompt", max_tokens=100)
            return torch.cat([each.flatten() for each in learner.gradient(batch)[1]])

        close = partial(torch.allclose, rtol=0, atol=1e-7)  # transformers' norms compute in float32
        whole = gradient()
        masked = gradient(teacher_mask=[1, 1, 0])
        alone = gradient(teacher_mask=[0, 0, 1])
        assert close(masked + alone, whole)
        # The tokens before the end do not depend on it: the same as if it were not in the loss at all.
        assert close(masked, gradient(teacher_mask=None, loss_mask=[1, 1, 0]))
        assert alone.abs().max() > 1e-6
        reinforced = gradient(teacher_mask=[1, 1, 0], loss_mask=None, reinforce=1.0, distill=0.0)
        assert torch.equal(reinforced, gradient(teacher_mask=None))

    def test_metrics_leave_the_token_out(self) -> None:
        members = [rollout([4, 8, OTHER], teacher_mask=[1, 1, 0]), rollout([4, OTHER], "s")]
        owner, place = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1])
        assert _judged(owner, place, members).tolist() == [True, True, False, True, True]
        assert _judged(owner, place, members[1:] * 2).all()

    def test_records_keep_the_mask_and_check_it(self) -> None:
        one = rollout([4, 8, OTHER], teacher_logprobs=[-1.0, -3.0, -8.0], teacher_mask=[1, 1, 0])
        row = rollout_to_dict(one)
        assert rollout_from_dict(row, where="x") == one
        for bad in ([1, 1], [1, 1, 2], "110"):
            with pytest.raises(DataError, match="teacher_mask"):
                rollout_from_dict({**row, "teacher_mask": bad}, where="x")

    def test_scope_weights_and_the_report_leave_the_token_out(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        one = rollout([4, 8, OTHER], teacher_logprobs=[-1.0, -3.0, -8.0], teacher_mask=[1, 1, 0], correct=False)
        file = tmp_path / "rollouts.jsonl"
        file.write_text(json.dumps(rollout_to_dict(one)) + "\n")
        assert main(["weights", str(file)]) == 0
        assert json.loads(capsys.readouterr().out)["ppl"] == pytest.approx(math.e**2)
        assert _perplexity([-1.0, -3.0, -8.0], None, [1, 1, 0]) == pytest.approx(math.e**2)
        assert _perplexity([-1.0, -3.0, -8.0], [0, 1, 1], [1, 1, 0]) == pytest.approx(math.e**3)
        assert _perplexity([-1.0, -3.0, -8.0], None, [1, 0]) is None
        # log pi_T - log pi_S is 0 and -2 where the teacher judges, and left out behind.
        assert _advantages({**rollout_to_dict(one), "reinforce": 0.5, "distill": 2.0}) == [0.5, -3.5, 0.5]


class TestWhichTokensTheyAre:
    def test_the_teachers_own_end_is_what_its_template_closes_a_turn_with(self) -> None:
        tokenizer = tiny_tokenizer()
        both = (EOS_ID, END_ID)
        assert own_end(tokenizer, both) == EOS_ID  # its template writes none: the tokenizer's
        assert own_end(tokenizer, (END_ID, OTHER)) == END_ID  # not even that: the first
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}"
        assert own_end(tokenizer, both) == END_ID
        assert own_end(tokenizer, (EOS_ID,)) == EOS_ID  # what it closes with is no end token
        tokenizer.chat_template = "{{ raise_exception('no') }}"
        assert own_end(tokenizer, both) == EOS_ID

    def test_a_served_teachers_end_tokens_come_from_its_tokenizers_folder(self, tmp_path: Path) -> None:
        folder = save_pair(tmp_path / "teacher", "llama")

        def of(**teacher: Any) -> tuple[int, ...] | None:
            config = validate_config({"teacher": {"base_urls": ["http://h/v1"], "model": "m", **teacher}})
            return served_ends(config, teacher_tokenizer(config))

        assert of() is None
        assert of(tokenizer=str(folder)) == of(path=str(folder)) == (EOS_ID,)
        (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
        assert of(tokenizer=str(folder)) == (EOS_ID, END_ID)
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
        assert of(tokenizer=str(folder)) == (EOS_ID, 7)

    def test_a_difference_is_said_and_done_as_configured(self) -> None:
        tokenizer = tiny_tokenizer()

        def judged(rule: str, teacher: tuple[int, ...] | None, **objective: Any) -> tuple[str, str, EndTokens | None]:
            config = validate_config({"objective": {"end_token": rule, **objective}})
            theirs = None if teacher is None else tokenizer
            finding, done = judge_ends(config, (EOS_ID, END_ID), teacher, tokenizer, theirs)
            return finding.level, str(finding), done

        for rule in ("score", "map", "exclude"):
            level, _, done = judged(rule, (OTHER, EOS_ID, END_ID))
            assert (level, done) == ("ok", None)
        level, told, done = judged("score", (EOS_ID,))
        assert (level, done) == ("warn", None)
        assert "2 '<end>' as any token" in told
        assert "'map' or 'exclude'" in told
        for rule, words in (("map", "2 '<end>' is scored as 1 '<eos>'"), ("exclude", "does not judge 2 '<end>'")):
            level, told, done = judged(rule, (EOS_ID,))
            assert level == "ok"
            assert words in told
            assert done is not None
            assert (done.rule, done.foreign, done.own) == (rule, {END_ID}, EOS_ID)
            assert judged(rule, None)[0] == "FAIL"
        assert judged("score", None)[0] == "warn"
        for kind in ("full_kl", "topk_reverse_kl"):
            assert judged("map", (EOS_ID,), distill=kind)[0] == "FAIL"
        assert judged("exclude", (EOS_ID,), distill="full_kl")[0] == "ok"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that may also end with many tokens, and a teacher that ends with <eos> alone."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder / "student", "qwen3", seed=1)
    save_pair(folder / "teacher", "llama", seed=2)
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configured(pair: Path, folder: Path, *more: str) -> Config:
    stops = list(range(3, 320, 4))
    return load_config(
        None,
        [
            f"model.path={pair / 'student'}", f"teacher.path={pair / 'teacher'}", f"data.train={pair / 'rows.jsonl'}",
            "rollout.n=4", "rollout.max_tokens=8", "rollout.temperature=1.0", "train.prompts_per_step=3",
            "train.steps=2", "train.device=cpu", f"chat.stop_token_ids={stops}", "run.export=false",
            "run.rollouts_logged=1000", "run.alarms.uniform_weights=off", "run.alarms.truncation=off",
            f"run.dir={folder}", *more,
        ],
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["score", "map", "exclude"])
def test_a_run_does_what_the_config_says_in_process_and_with_servers(rule: str, pair: Path, tmp_path: Path) -> None:
    table = Table(tiny_model("llama", seed=2))
    with FaultServer(table) as server:
        served = [f'teacher.base_urls=["{server.url}"]', f"teacher.model={MODEL}"]  # path stands in for the tokenizer
        for name, more in (("local", []), ("served", served)):
            config = configured(pair, tmp_path / name, f"objective.end_token={rule}", *more)
            built = build_engines(config)
            told = [line for line in built.warnings if line.startswith("end tokens")]
            assert len(told) == (rule == "score")
            try:
                train(config, built.engines, progress=False)
            finally:
                built.close()
    rows = [json.loads(line) for line in (tmp_path / "local" / "rollouts.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "served" / "rollouts.jsonl").read_text().splitlines()]
    ended = [row for row in rows if row["teacher_logprobs"] and row["token_ids"][-1] != EOS_ID
             and row["finish_reason"] == "stop"]  # fmt: skip
    assert len(ended) >= 5
    assert [row["teacher_mask"] for row in rows] == [row["teacher_mask"] for row in again]
    for row in ended:
        size = len(row["token_ids"])
        assert row["teacher_mask"] == ([1] * (size - 1) + [0] if rule == "exclude" else None)
        asked = row["token_ids"] if rule == "score" else [*row["token_ids"][:-1], EOS_ID]
        expected = table.logprobs([*row["prompt_token_ids"], *asked])[-size:]
        assert row["teacher_logprobs"] == pytest.approx(expected, abs=1e-4)
        if rule == "exclude":
            assert row["advantages"][-1] == 0.0


def test_map_and_exact_kl_do_not_go_together(pair: Path, tmp_path: Path) -> None:
    config = configured(pair, tmp_path / "run", "objective.end_token=map", "objective.distill=full_kl")
    with pytest.raises(ModelError, match="use 'exclude' or 'score'"):
        build_engines(config)
