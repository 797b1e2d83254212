"""Laws of ``train.distillation``: each kind is its divergence written out over full logits in float64, however its
numbers come: a chunk at a time from a teacher in process, or as the rows of servers."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fault_server import FAULTS, FaultServer, Table, at_random, made_rollouts
from scope_opd.errors import ConfigError
from scope_opd.models import head as head_module
from scope_opd.objective import chunked as chunked_module
from scope_opd.teacher.local import LocalTeacher
from scope_opd.train import distillation
from scope_opd.train.batch import Batch, MicroBatch, make_batch
from scope_opd.train.engines import Engines, SurrogateSettings
from scope_opd.train.step import Learner
from scope_opd.types import Rollout, TopK
from teacher_kit import teacher_of
from test_train_batch import distance
from test_train_step import naive_gradient, naive_logits, off_policy, prepare, recorded
from tiny import tiny_model
from train_kit import TEMPERATURE, make_config

EXACT, TOPK = tuple(distillation.EXACT), tuple(distillation.TOPK)
COMMON: dict[str, tuple[int, ...] | None] = {
    "all": None, "prefix": tuple(range(300)), "scattered": (0, 3, *range(40, 290), 325, 400),
}  # fmt: skip


def written_out(kind: str, student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The textbook sums over logits [T, C], by autograd."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind in TOPK:
        ids = q.topk(min(k, q.shape[-1])).indices
        if ids.shape[-1] < q.shape[-1]:
            p, q = (torch.cat((x.gather(-1, ids), _rest(x, ids)), dim=-1) for x in (p, q))
    m = ((p.exp() + q.exp()) / 2).log()
    reverse, forward = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    balanced = (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1) / 2
    return {"topk_forward_kl": forward, "jsd": balanced}.get(kind, reverse)


def _rest(logprobs: Tensor, ids: Tensor) -> Tensor:
    others = torch.ones_like(logprobs, dtype=torch.bool).scatter(-1, ids, False)
    return logprobs.masked_fill(~others, -1e9).logsumexp(-1, keepdim=True)


def case(
    kind: str, k: int = 12, common: Sequence[int] | None = None, method: str = "reward_opd", **tables: Any
) -> tuple[Engines, Learner, list[Rollout], Batch, Any]:
    """Two models of unlike heads in float64, rollouts of another policy's, and the teacher."""
    teacher = tiny_model("gpt_neox", seed=2, vocab_size=330, dtype=torch.float64)
    engines, _, rollouts, _ = prepare(
        method, engines={"teacher_head": LocalTeacher(teacher, temperature=TEMPERATURE)},
        objective={"distill": kind, "topk": k}, **tables,
    )  # fmt: skip
    off_policy(rollouts)
    engines.surrogate = dataclasses.replace(engines.surrogate, common_vocabulary=common)
    batch = make_batch(rollouts, aggregation="token", max_tokens=64)
    return engines, Learner(engines, make_config(Path("unused")).train), rollouts, batch, teacher


def terms(learner: Learner, batch: Batch) -> Tensor:
    """D_t of all tokens that distil, as the loss has them."""
    forward, found = learner.forward, []
    assert forward.distillation is not None
    for micro in batch.micro:
        moved: MicroBatch = micro.to(forward.device, forward.dtype)
        found.append(forward.distillation.scores(forward._hidden(moved), moved, None)[1][moved.distill != 0])
    return torch.cat(found).detach()


def test_the_kinds_of_config_settings_and_code_are_the_same() -> None:
    kinds = {field.name: field.type for field in dataclasses.fields(SurrogateSettings)}["distill"]
    assert eval(str(kinds), {"Literal": __import__("typing").Literal}).__args__ == ("sampled", *TOPK, *EXACT)
    declared = type(make_config(Path("x")).objective).model_fields["distill"].annotation
    assert get_args(declared) == ("sampled", *TOPK, *EXACT)


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("kind", [*TOPK, *EXACT])
def test_the_gradient_is_that_of_the_divergence_written_out(
    kind: str, common: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off policy: each token's divergence is multiplied by its correction, half of them above and half below 1."""
    engines, learner, rollouts, batch, teacher = case(kind, common=COMMON[common])
    width = engines.trained.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([i for i in COMMON[common] or range(width) if i < width])

    def term(r: Rollout, student: Tensor, sampling: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = naive_logits(teacher, r)[:, ids] / TEMPERATURE
            correction = (sampling - recorded(r.logprobs)).exp().clamp(max=2.0)
        value = written_out(kind, logits[:, ids] / TEMPERATURE, theirs, 12)
        return (correction * (r.distill * value - r.reinforce * student)).sum()  # type: ignore[operator]

    expected = naive_gradient(engines, rollouts, term)
    assert distance(learner.gradient(batch)[1], expected) < 1e-10
    # The same, tile by tile and chunk by chunk.
    monkeypatch.setattr(head_module, "KEPT_LOGITS", 1)
    monkeypatch.setattr(chunked_module, "TILE_TOKENS", 16)
    monkeypatch.setattr(chunked_module, "TILE_VOCABULARY", 64)
    monkeypatch.setattr(distillation, "CHUNK_LOGITS", 5 * width)
    assert distance(learner.gradient(batch)[1], expected) < 1e-10
    figures = learner.update(batch, 0.0).tokens
    assert math.isfinite(float(figures.advantage.sum()))
    assert figures.mismatch.abs().min() > 0.2


def test_of_all_ids_the_top_k_is_the_exact_divergence_and_more_ids_tell_more() -> None:
    values = {}
    for k in (1, 4, 32, 320, 10_000):
        _, learner, _, batch, _ = case("topk_reverse_kl", k, COMMON["scattered"])
        values[k] = terms(learner, batch)
        if k == 10_000:
            gradient = learner.gradient(batch)[1]
    _, learner, _, batch, _ = case("full_kl", common=COMMON["scattered"])
    exact = terms(learner, batch)
    assert (values[1] >= 0).all()
    for fewer, more in ((1, 4), (4, 32), (32, 320)):
        assert (values[fewer] <= values[more] + 1e-12).all()
    for k in (320, 10_000):
        torch.testing.assert_close(values[k], exact, rtol=1e-9, atol=1e-12)
    assert (values[4] < exact).all()
    assert distance(gradient, learner.gradient(batch)[1]) < 1e-10


@pytest.mark.parametrize("kind", [*TOPK, *EXACT])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind: str) -> None:
    engines, _, rollouts, _ = prepare("opd", objective={"distill": kind, "topk": 9})
    engines.teacher_head = LocalTeacher(engines.trained, temperature=TEMPERATURE)
    learner = Learner(engines, make_config(Path("unused")).train)
    batch = make_batch(rollouts, aggregation="token", max_tokens=64)
    found = terms(learner, batch)
    assert found.numel()
    assert (found >= 0).all()
    assert (found < 1e-13).all()
    assert max(float(part.abs().max()) for part in learner.gradient(batch)[1]) < 1e-9


@pytest.mark.parametrize("kind", [*TOPK, *EXACT])
@pytest.mark.parametrize("method", ["scope", "dual_path", "opd", "reward_opd"])
def test_no_cut_into_micro_batches_changes_the_update(method: str, kind: str) -> None:
    config = make_config(Path("unused"), train={"grad_clip": "off"})
    engines, _, rollouts, _ = prepare(
        method, objective={"distill": kind, "topk": 9},
        engines={"model": tiny_model("gpt_neox", seed=1, dtype=torch.float64)},
    )  # fmt: skip
    learner = Learner(engines, config.train)
    live = [i for i, rollout in enumerate(rollouts) if not rollout.masked]
    whole = make_batch(rollouts, aggregation="prompt", max_tokens=10_000)
    loss, expected = learner.gradient(whole)
    for cut in ([[i] for i in live], [live[::2], live[1::2]]):
        for packed in (False, learner.forward.packs):
            other = make_batch(rollouts, aggregation="prompt", max_tokens=0, cut=cut, packed=packed)
            again, found = learner.gradient(other)
            assert again == pytest.approx(loss, rel=1e-10)
            assert distance(found, expected) < 1e-10


@pytest.mark.parametrize("ids", [(), (5_000, 5_001)])
def test_heads_without_a_common_id_are_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="common_vocabulary has no id below"):
        case("full_kl", common=ids)


def test_an_exact_kind_needs_a_teacher_in_process_and_a_top_k_kind_some_rows() -> None:
    for kind in EXACT:
        engines, *_ = case(kind)
        engines.teacher_head = None
        with pytest.raises(ValueError, match=f"'{kind}' without teacher_head; expected an in-process teacher"):
            Learner(engines, make_config(Path("unused")).train)
    engines, _, _, batch, _ = case("topk_reverse_kl")
    engines.teacher_head = None
    with pytest.raises(ValueError, match="neither teacher_head nor teacher_topk"):
        Learner(engines, make_config(Path("unused")).train).gradient(batch)


class Largest(TorchDispatchMode):
    """The most rows that a tensor as wide as a vocabulary, or a part of it, ever had."""

    rows = 0
    widths = (320, 321, 330, 56, 320 % 56, 330 % 56)
    hidden = 32  # rows of a transposed head

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] in self.widths:
                self.rows = max(self.rows, tensor.shape[0] if tensor.shape[0] != self.hidden else 0)
        return out


@pytest.mark.parametrize("kind", [*TOPK, *EXACT])
def test_no_tensor_is_as_wide_as_the_vocabulary_beyond_a_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "KEPT_LOGITS", 1)
    monkeypatch.setattr(chunked_module, "TILE_TOKENS", 7)
    monkeypatch.setattr(chunked_module, "TILE_VOCABULARY", 56)
    monkeypatch.setattr(distillation, "CHUNK_LOGITS", 7 * 320)
    _, learner, rollouts, _, _ = case(kind, method="opd")
    everything = [[index for index, rollout in enumerate(rollouts) if not rollout.masked]]
    (micro,) = make_batch(rollouts, aggregation="token", max_tokens=0, cut=everything).micro
    assert micro.distill.count_nonzero() > 30
    with Largest() as largest:
        learner.forward.run(micro, 1, None).loss.sum().backward()
    assert largest.rows == 7


def test_the_teacher_computes_outside_the_students_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in (("full_kl", "project"), ("topk_reverse_kl", "top")):
        _, learner, _, batch, _ = case(kind)
        head, asked = learner.forward.distillation.teacher, []  # type: ignore[union-attr]
        assert isinstance(head, LocalTeacher)
        own = getattr(head, name)

        def counted(*given: Any, own: Any = own, asked: list[bool] = asked) -> Any:
            asked.append(torch.is_autocast_enabled("cpu"))
            return own(*given)

        monkeypatch.setattr(head, name, counted)
        learner.forward.autocast = True
        learner.gradient(batch)
        assert asked
        assert not any(asked)


# ---- rows of servers


def as_served(teacher: Any, rollouts: Sequence[Rollout], k: int) -> list[Rollout]:
    """The rollouts with what a server of this teacher says of them."""
    with FaultServer(Table(teacher)) as server, teacher_of(server.url, top_k=k) as served:
        scores = asyncio.run(served.score(rollouts))
        assert {body["prompt_logprobs"] for body in server.bodies} == {k}
    return [
        dataclasses.replace(rollout, teacher_logprobs=score.logprobs, teacher_topk=score.topk)
        for rollout, score in zip(rollouts, scores, strict=True)
    ]


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("kind", TOPK)
def test_rows_of_servers_are_renormalised_over_the_common_ids_among_them(kind: str, common: str) -> None:
    """The k likeliest of all ids; what is not common of them is taken out of the whole, the rest is the tail."""
    k, width = 12, 320
    teacher = tiny_model("gpt_neox", seed=2, vocab_size=330, dtype=torch.float64)
    engines, _, rollouts, _ = prepare(
        "reward_opd", objective={"distill": kind, "topk": k, "temperature": "released"}, engines={"teacher_head": None}
    )
    off_policy(rollouts)
    rollouts = as_served(teacher, rollouts, k)
    engines.surrogate = dataclasses.replace(engines.surrogate, common_vocabulary=COMMON[common])
    ids = torch.tensor([i for i in COMMON[common] or range(width) if i < width])
    strange = [0, 0]

    def term(r: Rollout, student: Tensor, sampling: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            top = naive_logits(teacher, r).log_softmax(-1).topk(k)
            correction = (sampling - recorded(r.logprobs)).exp().clamp(max=2.0)
        log_p, total = (logits[:, ids] / TEMPERATURE).log_softmax(-1), torch.zeros((), dtype=torch.float64)
        for row, (values, places) in enumerate(zip(top.values, top.indices, strict=True)):
            known = torch.isin(places, ids)
            strange[0] += int((~known).sum())
            strange[1] += int((places >= width).sum())
            q = values[known].exp() / (1 - values[~known].exp().sum())
            p = log_p[row, torch.searchsorted(ids, places[known])].exp()
            p, q = (torch.cat((x, (1 - x.sum())[None])) for x in (p, q))
            value = (p * (p / q).log() if kind == "topk_reverse_kl" else q * (q / p).log()).sum()
            total = total + correction[row] * r.distill * value
        return total - (correction * r.reinforce * student).sum()  # type: ignore[operator]

    learner = Learner(engines, make_config(Path("unused")).train)
    expected = naive_gradient(engines, rollouts, term)
    for size in (64, 10_000):
        batch = make_batch(rollouts, aggregation="token", max_tokens=size)
        assert distance(learner.gradient(batch)[1], expected) < 1e-5  # rows are float32
    assert strange[1] > 0
    assert (strange[0] > strange[1]) == (common == "scattered" or common == "prefix")


@pytest.mark.parametrize("kind", TOPK)
def test_rows_of_servers_give_what_the_teacher_in_process_gives(kind: str) -> None:
    teacher = tiny_model("gpt_neox", seed=2, dtype=torch.float64)
    engines, learner, rollouts, batch = prepare(
        "scope", objective={"distill": kind, "topk": 12, "temperature": "released"},
        engines={"teacher_head": LocalTeacher(teacher)},
    )  # fmt: skip
    expected, values = learner.gradient(batch), terms(learner, batch)
    scored = [rollout for rollout in rollouts if rollout.distill]
    served = dict(zip((r.id for r in scored), as_served(teacher, scored, 12), strict=True))
    for rollout in scored:  # the correct ones have no rows, as in a run
        rollout.teacher_topk = served[rollout.id].teacher_topk
    engines.teacher_head = None
    other, batch = (
        Learner(engines, make_config(Path("unused")).train),
        make_batch(rollouts, aggregation="prompt", max_tokens=256),
    )
    torch.testing.assert_close(terms(other, batch), values, rtol=1e-5, atol=1e-6)
    loss, found = other.gradient(batch)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert distance(found, expected[1]) < 1e-5


def test_random_faults_leave_every_row_as_it_is() -> None:
    table, rollouts = Table(tiny_model("qwen3", seed=3)), made_rollouts(60, seed=4)
    kinds = [fault for fault in FAULTS if fault not in ("slow", "429_later")]
    with FaultServer(table, at_random(0.3, kinds, 1)) as server, teacher_of(server.url, top_k=5) as teacher:
        scores = asyncio.run(teacher.score(rollouts))
        assert server.injected.total() >= 15
    for rollout, score in zip(rollouts, scores, strict=True):
        assert score.topk is not None
        tokens = (*rollout.prompt_token_ids, *rollout.token_ids)
        places = table.likeliest(tokens, 5)[len(rollout.prompt_token_ids) - 1 :]
        expected = [sorted(((-value, index) for index, value in row.items()))[:5] for row in places]
        assert score.topk == TopK.of([[(index, -value) for value, index in row] for row in expected])
        assert len(score.topk) == len(rollout.token_ids)


def test_a_server_that_gives_too_few_is_found_before_the_run() -> None:
    with FaultServer(Table(tiny_model("qwen3", seed=3))) as server:
        server.max_likeliest = 20
        expected = pytest.raises(ConfigError, match=r"20.*asked for the 21 likeliest.*--max-logprobs 21")
        with expected as error, teacher_of(server.url, top_k=21):
            pass
        assert "\n" not in str(error.value)
