"""Laws of ``objective.chunked``: tiles give what full logits give, in value and in gradient, whatever the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from scope_opd.models import head as head_module
from scope_opd.models.head import HeadView, response_logprobs, score_hidden
from scope_opd.objective import tiles as tiles_module
from scope_opd.objective.chunked import Tail, chunked_logprobs, chunked_topk
from test_models import ALL_KINDS, ragged
from tiny import tiny_model

Score = dict[str, Tensor]


def draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_ids(rows: int, columns: int, below: int, seed: int = 0) -> Tensor:
    """Distinct ids a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(below, generator=generator)[:columns] for _ in range(rows)])


def naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    tail: Tail,
    t: float,
    extra: float,
) -> Score:
    """Everything from full logits."""
    logits = tail(hidden @ weight.t() + (0.0 if bias is None else bias))
    log_p = (logits / t).log_softmax(-1)
    return {
        "logprobs": log_p.gather(-1, targets[:, None])[:, 0],
        "id_logprobs": log_p.gather(-1, ids),
        "rest_logprobs": log_p.scatter(-1, ids, -torch.inf).logsumexp(-1),
        "entropy": -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1),
        "extra_logprobs": (logits / extra).log_softmax(-1).gather(-1, targets[:, None])[:, 0],
    }


def loss(scores: Score, with_rest: bool = True) -> Tensor:
    """Nothing linear: ratios, squares, products of one with another."""
    total = (scores["logprobs"] * draw(len(scores["logprobs"]), seed=7).to(scores["logprobs"])).exp().sum()
    total = (
        total + (scores["id_logprobs"].square() * 0.1).sum() + (scores["logprobs"] * scores["id_logprobs"][:, 0]).sum()
    )
    return total + (scores["rest_logprobs"].square() * 0.3).sum() if with_rest else total


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rest", [False, True])
@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(1, 9), rows=st.integers(6, 23), tile=st.tuples(st.integers(1, 10), st.integers(1, 24)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_tiles_give_what_full_logits_give(
    cap: float | None,
    with_bias: bool,
    frozen: bool,
    rest: bool,
    tokens: int,
    rows: int,
    tile: tuple[int, int],
    seed: int,
) -> None:
    hidden, weight = (
        draw(tokens, 5, seed=seed).requires_grad_(),
        draw(rows, 5, seed=seed + 1).requires_grad_(not frozen),
    )
    bias = draw(rows, seed=seed + 2).requires_grad_(not frozen) if with_bias else None
    ids = draw_ids(tokens, 4, rows, seed)
    targets = ids[:, 1] if seed % 2 else draw_ids(tokens, 1, rows, seed + 1)[:, 0]
    tail = Tail(0.7, cap)
    expected = naive(hidden, weight, targets, ids, bias, tail, 0.6, 1.3)
    found = chunked_logprobs(
        hidden, weight, targets, 0.6, bias=bias, tail=tail, ids=ids, rest=rest, extra_temperature=1.3,
        tile_tokens=tile[0], tile_vocabulary=tile[1],
    )  # fmt: skip
    values = {name: getattr(found, name) for name in expected}
    for name, value in values.items():
        if name == "rest_logprobs" and not rest:
            assert value is None
            continue
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)
        assert value.requires_grad == (name not in ("entropy", "extra_logprobs"))
    inputs = [hidden] + [part for part in (weight, bias) if part is not None and not frozen]
    exact = torch.autograd.grad(loss(expected, rest), inputs)
    for got, want in zip(torch.autograd.grad(loss(values, rest), inputs), exact, strict=True):
        assert (got - want).norm() <= 1e-11 * want.norm()


@pytest.mark.parametrize("scale", [0.3, 1.5])
def test_float32_is_as_close_to_float64_as_the_contract_says(scale: float) -> None:
    """Values to a relative 1e-6, gradients to a relative 1e-5 (L2), over a large vocabulary and peaked rows."""
    tokens, width, rows = 48, 96, 30_000
    inputs = draw(tokens, width, dtype=torch.float32), draw(rows, width, seed=1, scale=scale / 10, dtype=torch.float32)
    wide, single = (tuple(part.to(dtype).requires_grad_() for part in inputs) for dtype in (torch.double, torch.float))
    targets, ids = draw_ids(tokens, 1, rows)[:, 0], draw_ids(tokens, 8, rows, seed=3)
    targets[::2] = (wide[0] @ wide[1].t()).argmax(-1)[::2]
    expected = naive(*wide, targets, ids, None, Tail(), 0.6, 1.0)
    found = chunked_logprobs(
        *single, targets, 0.6, ids=ids, rest=True, extra_temperature=1.0, tile_tokens=16, tile_vocabulary=2_048
    )
    values = {name: getattr(found, name) for name in expected}
    for name, value in values.items():
        assert value.dtype == torch.float32
        assert (value.double() - expected[name]).norm() <= 1e-6 * expected[name].norm(), name
    exact = torch.autograd.grad(loss(expected), wide)
    for got, want in zip(torch.autograd.grad(loss(values), single), exact, strict=True):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_gradients_pass_gradcheck() -> None:
    hidden, weight, bias = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(3, 4), (7, 4), (7,)]))
    ids = draw_ids(3, 3, 7)

    def scores(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = chunked_logprobs(
            hidden, weight, ids[:, 0], 0.8, bias=bias, tail=Tail(1.2, 2.0), ids=ids, rest=True,
            tile_tokens=2, tile_vocabulary=3,
        )  # fmt: skip
        assert found.id_logprobs is not None
        assert found.rest_logprobs is not None
        return found.logprobs, found.id_logprobs, found.rest_logprobs

    assert torch.autograd.gradcheck(scores, (hidden, weight, bias))


def test_a_tiny_rest_keeps_its_value_and_its_gradient() -> None:
    """A rest of e-40 in float32, where 1 - sum of the others is 0: its log and slope are those of float64."""
    logits = torch.cat((torch.zeros(2, 2), -40.0 - torch.rand(2, 6, generator=torch.Generator().manual_seed(0))), dim=1)
    ids = torch.tensor([[0, 1], [0, 1]])
    found, slopes = [], []
    for dtype in (torch.float32, torch.float64):
        weight = logits.t().to(dtype).clone().requires_grad_()
        eye = torch.eye(2, dtype=dtype)
        value = chunked_logprobs(eye, weight, ids[:, 0], ids=ids, rest=True, tile_vocabulary=3).rest_logprobs
        assert value is not None
        found.append(value.double())
        slopes.append(torch.autograd.grad(value.sum(), weight)[0].double())
    exact = (logits.double().log_softmax(-1)[:, 2:]).logsumexp(-1)
    torch.testing.assert_close(found[1], exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-7)


def test_the_rest_of_a_whole_vocabulary_is_nothing() -> None:
    hidden, weight = draw(3, 4, dtype=torch.float32).requires_grad_(), draw(5, 4, seed=1, dtype=torch.float32)
    ids = torch.arange(5).expand(3, 5)
    rest = chunked_logprobs(hidden, weight.requires_grad_(), ids[:, 0], ids=ids, rest=True).rest_logprobs
    assert rest is not None
    assert (rest < -80).all()
    assert all(part.isfinite().all() for part in torch.autograd.grad(rest.sum(), (hidden, weight)))


def test_an_id_ruled_out_by_its_bias_has_no_mass_anywhere() -> None:
    """The way to renormalise over common ids; a tile may hold nothing else."""
    hidden, weight = draw(4, 3).requires_grad_(), draw(9, 3, seed=1).requires_grad_()
    bias = torch.zeros(9, dtype=torch.float64)
    bias[[0, 1, 2, 7]] = -torch.inf
    kept = bias.isfinite().nonzero()[:, 0]
    targets = kept[torch.tensor([0, 1, 2, 4])]
    found = chunked_logprobs(
        hidden, weight, targets, 0.6, bias=bias, ids=torch.tensor([[0, 3]] * 4), rest=True, extra_temperature=1.0,
        tile_vocabulary=3,
    )  # fmt: skip
    expected = (hidden @ weight[kept].t() / 0.6).log_softmax(-1)
    torch.testing.assert_close(found.logprobs, expected.gather(-1, torch.tensor([[0], [1], [2], [4]]))[:, 0])
    torch.testing.assert_close(found.entropy, -(expected.exp() * expected).sum(-1).detach())
    assert found.id_logprobs is not None
    assert (found.id_logprobs[:, 0] == -torch.inf).all()
    got = torch.autograd.grad(found.logprobs.sum(), (hidden, weight))
    want = torch.autograd.grad(expected.gather(-1, torch.tensor([[0], [1], [2], [4]])).sum(), (hidden, weight))
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right)


def test_no_log_prob_exceeds_zero_and_a_certain_token_has_exactly_zero() -> None:
    hidden = 40.0 * torch.eye(3)
    found = chunked_logprobs(hidden, torch.eye(3) * 10.0, torch.arange(3))
    assert found.logprobs.tolist() == [0.0, 0.0, 0.0]
    assert found.entropy is not None
    assert (found.entropy.abs() < 1e-30).all()


def test_no_tokens_give_no_scores_and_a_gradient_of_zero() -> None:
    weight = draw(5, 3).requires_grad_()
    found = chunked_logprobs(draw(0, 3).requires_grad_(), weight, torch.zeros(0, dtype=torch.long))
    assert found.logprobs.shape == (0,)
    found.logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_under_autocast_products_are_bfloat16_and_everything_else_float32() -> None:
    hidden, weight = draw(6, 16, dtype=torch.float32).requires_grad_(), draw(40, 16, seed=1, dtype=torch.float32)
    weight.requires_grad_()
    targets = torch.arange(6)

    def gradients(logprobs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(logprobs.sum(), (hidden, weight))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_logprobs(hidden, weight, targets, tile_vocabulary=16)
        expected = (hidden @ weight.t()).float().log_softmax(-1)[torch.arange(6), targets]
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(found.logprobs, expected, rtol=0, atol=2e-3)
    for got, want in zip(gradients(found.logprobs), gradients(expected), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 2e-2 * want.norm()


def test_bfloat16_weights_get_bfloat16_gradients_summed_in_float32() -> None:
    hidden, weight = draw(64, 16, dtype=torch.bfloat16).requires_grad_(), draw(40, 16, seed=1, dtype=torch.bfloat16)
    weight.requires_grad_()
    found = chunked_logprobs(hidden, weight, torch.zeros(64, dtype=torch.long), tile_tokens=4)
    got = torch.autograd.grad(found.logprobs.sum(), weight)[0]
    wide = weight.detach().double().requires_grad_()
    want = torch.autograd.grad((hidden.detach().double() @ wide.t()).log_softmax(-1)[:, 0].sum(), wide)[0]
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() <= 1e-2 * want.norm()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30), k=st.integers(1, 30), tile=st.tuples(st.integers(1, 5), st.integers(1, 31)),
    cap=st.sampled_from([None, 4.0]), share=st.sampled_from([0.0, 0.2, 0.8]),
)  # fmt: skip
def test_the_likeliest_ids_and_the_mass_of_the_rest_are_those_of_full_logits(
    rows: int, k: int, tile: tuple[int, int], cap: float | None, share: float
) -> None:
    hidden, weight, k, tail = draw(5, 4, scale=3.0), draw(rows, 4, seed=1), min(k, rows), Tail(0.9, cap)
    excluded = draw_ids(1, int(share * rows), rows, seed=2)[0].sort().values if share else None
    ids, logprobs, rest = chunked_topk(
        hidden, weight, k, 0.7, tail=tail, excluded=excluded, tile_tokens=tile[0], tile_vocabulary=tile[1]
    )
    logits = tail(hidden @ weight.t()) / 0.7
    if excluded is not None:
        logits[:, excluded] = -torch.inf
    log_p = logits.log_softmax(-1)
    values, places = log_p.topk(k, dim=-1)
    assert torch.equal(ids, places.masked_fill(values == -torch.inf, -1))
    torch.testing.assert_close(logprobs, values)
    others = log_p.scatter(-1, places, -torch.inf).logsumexp(-1)
    assert (rest[others == -torch.inf] < -80).all()
    seen = others > -torch.inf
    torch.testing.assert_close(rest[seen], others[seen], rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(4, 30), tile=st.tuples(st.integers(1, 5), st.integers(1, 31)), seed=st.integers(0, 99),
    cap=st.sampled_from([None, 3.0]), bias=st.booleans(), frozen=st.booleans(), rest=st.booleans(),
)  # fmt: skip
def test_a_missing_id_is_nothing_and_excluded_ids_are_no_part_of_the_rest(
    rows: int, tile: tuple[int, int], seed: int, cap: float | None, bias: bool, frozen: bool, rest: bool
) -> None:
    """-1 among the ids has no log-prob and no gradient; what is excluded still counts for the softmax."""
    hidden, weight = draw(5, 4, seed=seed).requires_grad_(), draw(rows, 4, seed=1).requires_grad_(not frozen)
    added = draw(rows, seed=2) if bias else None
    order = draw_ids(1, rows, rows, seed)[0]
    excluded, kept = order[: rows // 3].sort().values, order[rows // 3 :]
    ids = kept[draw_ids(5, 2, len(kept), seed)]
    ids[1, 0] = ids[2, 1] = ids[3, 0] = ids[3, 1] = -1
    targets = order[torch.tensor([0, 1, 2, 3, 0])]
    scores = chunked_logprobs(
        hidden, weight, targets, 0.6, bias=added, tail=Tail(0.7, cap), ids=ids, rest=rest, excluded=excluded,
        tile_tokens=tile[0], tile_vocabulary=tile[1],
    )  # fmt: skip
    logits = Tail(0.7, cap)(hidden @ weight.t() + (0.0 if added is None else added)) / 0.6
    log_p = logits.log_softmax(-1)
    there = ids >= 0
    expected = log_p.gather(-1, ids.clamp_min(0))
    out = torch.zeros(5, rows + 1, dtype=torch.bool).scatter_(-1, torch.where(there, ids, rows), True)[:, :-1]
    others = log_p.masked_fill(out.index_fill(-1, excluded, True), -1e30).logsumexp(-1)
    found, left = scores.id_logprobs, scores.rest_logprobs
    assert found is not None
    assert (found[~there] == -torch.inf).all()
    torch.testing.assert_close(found[there], expected[there], rtol=1e-10, atol=1e-12)

    def total(chosen: Tensor, tokens: Tensor, mass: Tensor | None) -> Tensor:
        value = torch.where(there, chosen, 0.0).exp().square().sum() + tokens.exp().sum()
        return value if mass is None else value + (mass.exp() * 3.0 + mass.exp().square()).sum()

    exact = others if rest else None
    if left is not None:
        torch.testing.assert_close(left.exp(), others.exp(), rtol=1e-10, atol=1e-12)
    inputs = [hidden] if frozen else [hidden, weight]
    want = torch.autograd.grad(total(expected, log_p.gather(-1, targets[:, None])[:, 0], exact), inputs)
    got = torch.autograd.grad(total(found, scores.logprobs, left), inputs)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0"), ({"extra_temperature": -1.0}, "extra_temperature = -1"),
        ({"tile_tokens": 0}, "0 tokens"), ({"tile_vocabulary": 0}, "0 ids"),
        ({"ids": torch.tensor([[1], [5]])}, r"row 1 asks for ids \[0, 5\]; expected 0..4"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunked_logprobs(draw(2, 3), draw(5, 3), torch.tensor([1, 0]), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k = 6"):
        chunked_topk(draw(2, 3), draw(5, 3), 6)


# ---- in the models' room


def model_gradient(model: nn.Module, value: Tensor) -> Tensor:
    pieces = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([piece.flatten() for piece in pieces])


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_head_gives_the_same_with_tiles_and_without(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied and untied, soft-capped and scaled, to 1e-10 in float64: top-k ids and the rest with them."""
    model = tiny_model(kind, dtype=torch.float64)
    ids, _, positions = ragged()
    wanted = draw_ids(len(positions), 5, 320)
    view = HeadView(model)
    assert view.plain
    found = []
    wanted[0, 2:] = -1
    excluded = torch.tensor([i for i in range(0, 320, 3) if i not in set(wanted.flatten().tolist())])
    for kept in (1, 2**24):
        monkeypatch.setattr(head_module, "KEPT_LOGITS", kept)
        scores = score_hidden(
            view, view.response_hidden(ids, None, positions), ids[positions[:, 0], positions[:, 1]], 0.6,
            extra_temperature=1.1, ids=wanted, rest=True, excluded=excluded,
        )  # fmt: skip
        values = {name: getattr(scores, name) for name in type(scores).__slots__}
        assert all(value is not None for value in values.values())
        values["id_logprobs"] = values["id_logprobs"].exp()
        total = scores.logprobs.sum() + values["id_logprobs"].square().sum() + values["rest_logprobs"].square().sum()
        found.append([*values.values(), model_gradient(model, total)])
    for left, right in zip(*found, strict=True):
        assert (left - right).norm() <= 1e-10 * right.norm()


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_likeliest_ids_of_a_head_are_the_same_with_tiles_and_without(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, excluded = tiny_model(kind, dtype=torch.float64), torch.arange(0, 320, 7)
    ids, _, positions = ragged()
    view = HeadView(model)
    hidden = view.response_hidden(ids, None, positions)
    tiled = view.top(hidden, 9, 0.6, excluded)
    monkeypatch.setattr(HeadView, "plain", False)
    whole = view.top(hidden, 9, 0.6, excluded)
    assert torch.equal(tiled[0], whole[0])
    for left, right in zip(tiled[1:], whole[1:], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_leaves_the_backbones_gradient_as_it_was() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    ids, _, positions = ragged()
    view, body = HeadView(model), list(model.model.parameters())

    def gradients() -> tuple[Tensor, ...]:
        value = response_logprobs(view, ids, None, positions, 0.6, chunk_tokens=8).logprobs.square().sum()
        return torch.autograd.grad(value, body)

    before = gradients()
    model.lm_head.requires_grad_(False)
    for left, right in zip(before, gradients(), strict=True):
        assert (left - right).norm() <= 1e-11 * right.norm()


def test_a_head_whose_weights_fsdp_shards_is_whole_where_it_is_needed() -> None:
    """One rank: the sharded head's scores and gradients are those of the plain one, gathered through its own hooks."""
    ids, _, positions = ragged()
    plain, sharded = tiny_model("llama", dtype=torch.float64), tiny_model("llama", dtype=torch.float64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded.lm_head, mesh=init_device_mesh("cpu", (1,)))
        gradients = []
        for model in (plain, sharded):
            view = HeadView(model)
            assert view.plain
            response_logprobs(view, ids, None, positions, 0.6, chunk_tokens=8).logprobs.square().sum().backward()
            grads = [parameter.grad for parameter in model.parameters()]
            gradients.append([grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads])
        assert isinstance(sharded.lm_head.weight.grad, DTensor)
    finally:
        dist.destroy_process_group()
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


class Doubled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2.0 * super().forward(hidden)


@pytest.mark.parametrize("how", ["own forward", "hook"])
def test_a_head_that_does_more_than_a_matrix_is_not_taken_apart(how: str) -> None:
    model = tiny_model("llama")
    if how == "hook":
        model.lm_head.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    else:
        head = Doubled(32, 320, bias=False)
        head.weight = model.lm_head.weight
        model.set_output_embeddings(head)
    view = HeadView(model)
    assert view.exact
    assert not view.plain
    ids, _, positions = ragged()
    with torch.no_grad():
        found = response_logprobs(view, ids, None, positions, 0.6, chunk_tokens=4).logprobs
        expected = (model(ids).logits / 0.6).log_softmax(-1)[positions[:, 0], positions[:, 1] - 1]
    targets = ids[positions[:, 0], positions[:, 1]]
    torch.testing.assert_close(found, expected.gather(-1, targets[:, None])[:, 0], rtol=0, atol=2e-5)


def test_the_update_is_the_same_with_tiles_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step's gradient, clip and corrections included, in float64."""
    from test_train_step import distance, prepare

    _, learner, _, batch = prepare(objective={"clip": 0.2})
    kept = learner.gradient(batch)
    monkeypatch.setattr(head_module, "KEPT_LOGITS", 1)
    monkeypatch.setattr("scope_opd.objective.chunked.TILE_TOKENS", 7)
    monkeypatch.setattr("scope_opd.objective.chunked.TILE_VOCABULARY", 50)
    tiled = learner.gradient(batch)
    assert tiled[0] == pytest.approx(kept[0], rel=1e-12)
    assert distance(tiled[1], kept[1]) < 1e-10


def saved_sizes(run: Callable[[], object]) -> list[int]:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sizes


def test_nothing_of_the_vocabularys_width_is_kept_for_the_backward_pass() -> None:
    hidden, weight = draw(50, 4).requires_grad_(), draw(1_000, 4, seed=1).requires_grad_()
    targets = torch.zeros(50, dtype=torch.long)
    assert max(saved_sizes(lambda: chunked_logprobs(hidden, weight, targets))) == weight.numel()
    frozen = copy.deepcopy(weight).requires_grad_(False)
    assert max(saved_sizes(lambda: chunked_logprobs(hidden, frozen, targets))) == weight.numel()


def test_products_that_are_never_rounded_are_used_where_the_device_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's half-precision products with float32 sums, played by float32 products of the same factors."""
    hidden, weight = (draw(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate([(12, 16), (40, 16)]))
    targets, upstream = draw_ids(12, 1, 40)[:, 0], draw(12, seed=5, dtype=torch.float32)

    def score(dtype: torch.dtype) -> list[Tensor]:
        inputs = [part.detach().to(dtype).requires_grad_() for part in (hidden, weight)]
        found = chunked_logprobs(*inputs, targets, 0.6, tile_tokens=5, tile_vocabulary=16)
        return [
            found.logprobs.detach(),
            *torch.autograd.grad((found.logprobs * upstream.to(found.logprobs)).sum(), inputs),
        ]

    def distance(found: list[Tensor]) -> list[float]:
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    def played(to: Tensor, left: Tensor, right: Tensor, *, alpha: float, beta: float = 1.0) -> None:
        torch.addmm(to, left.float(), right.float(), beta=beta, alpha=alpha, out=to)

    exact, rounded = score(torch.float64), score(torch.bfloat16)
    assert not tiles_module.multiplies_wide(hidden.device, torch.bfloat16)
    monkeypatch.setattr(tiles_module, "multiplies_wide", lambda device, dtype: True)
    monkeypatch.setattr(tiles_module, "_addmm_wide", played)
    wide = distance(score(torch.bfloat16))
    assert wide[0] < 1e-6 < distance(rounded)[0]
    assert all(0 < left < right for left, right in zip(wide[1:], distance(rounded)[1:], strict=True))
