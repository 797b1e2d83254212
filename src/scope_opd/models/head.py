"""Log-probs of response tokens from any Hugging Face causal LM, without a full-vocabulary tensor beyond a chunk.

A causal LM is a backbone (ids to hidden states) and a head (hidden states to logits: a matrix, perhaps a bias, a scale
or a soft-cap). ``HeadView`` takes the two apart, so that only positions which predict a response token are projected,
a chunk at a time. It is checked against the model's own forward when it is made; where the two differ the model's own
full forward is used instead (``exact`` says which), which is right but keeps one logit tensor of a whole batch.
Log-probs come from ``objective.chunked`` in tiles of tokens x vocabulary where the head is a plain matrix, and else
from chunks of tokens that the backward pass computes again.

Not covered: encoder-decoder models, heads split over devices.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from scope_opd.objective.chunked import Tail, chunked_logprobs, chunked_topk
from scope_opd.objective.logprobs import tempered, token_entropy, token_logprobs

# Logits in one chunk at most, when no chunk is asked for: 256 MiB in float32.
CHUNK_LOGITS = 2**26
# Up to so many logits are kept for the backward pass rather than computed again: 64 MiB in float32.
KEPT_LOGITS = 2**24


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What ``response_logprobs`` returns; T is the number of positions asked for.

    Attributes:
        logprobs: F[T], log-prob of each token at ``temperature``; carries the gradient.
        entropy: F[T], entropy in nats of the distribution that predicts it, at ``temperature``; no gradient. None
            when not asked for.
        extra_logprobs: F[T], log-prob at ``extra_temperature``; no gradient. None when not asked for.
        id_logprobs: F[T, K], log-prob of the ids asked for at ``temperature``; carries the gradient. None when not
            asked for.
        rest_logprobs: F[T], log of the mass of all ids but those K and the excluded; carries the gradient. None when
            not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    extra_logprobs: Tensor | None
    id_logprobs: Tensor | None = None
    rest_logprobs: Tensor | None = None


class HeadView:
    """A causal LM as backbone and head.

    Args:
        model: a causal LM in eval mode; its parameters are shared, not copied.

    Attributes:
        exact: True when backbone + head reproduce the model's own logits (at their natural size and thirty times as
            large, where a soft-cap or scale shows); False when the model's own forward is used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.backbone: nn.Module = model.base_model
        self.head: nn.Module | None = model.get_output_embeddings()
        self._tail = Tail()
        self._backbone_arguments = set(inspect.signature(self.backbone.forward).parameters)
        self._model_arguments = set(inspect.signature(model.forward).parameters)
        found = self._find_tail()
        self.exact = found is not None
        if found is not None:
            self._tail = found

    @property
    def vocabulary(self) -> int:
        """Rows of the head: the size of a logit vector."""
        weight = getattr(self.head, "weight", None)
        return int(self.model.config.get_text_config().vocab_size if weight is None else weight.shape[0])

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, **further: Any) -> Tensor:
        """What the head projects, [B, L, H]. Where the view is not exact these are the logits themselves.

        Args:
            input_ids: I[B, L].
            attention_mask: I[B, L], 1 on tokens. None states that padding, if any, is on the right: with causal
                attention no token then sees padding, and no mask is needed.
            further: handed to the model as it is (what ``models.packing`` says about a pack).
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False, **further}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        module, known = (self.backbone, self._backbone_arguments) if self.exact else (self.model, self._model_arguments)
        if "position_ids" not in known:
            inputs.pop("position_ids", None)
        output = module(**inputs)
        return output.last_hidden_state if self.exact else output.logits

    def response_hidden(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """``hidden`` at the places that predict the tokens at ``positions``.

        Args:
            input_ids, attention_mask: as for ``hidden``.
            positions: I[T, 2] of (row, column) of the predicted tokens; column >= 1, for the first token of a row
                has nothing before it.

        Returns:
            [T, H].
        """
        return self.hidden(input_ids, attention_mask)[positions[:, 0], positions[:, 1] - 1]

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H], returned in float32 (float64 for a float64 model).

        The head's product itself is computed in the head's dtype, or in autocast's where that is on: bfloat16 logits
        carry about three digits. Everything after it (temperature, softmax, sums) is float32.
        """
        if self.exact:
            assert self.head is not None
            hidden = self._tail(self.head(hidden))
        return hidden if hidden.dtype == torch.float64 else hidden.float()

    @property
    def plain(self) -> bool:
        """Whether the head is a matrix (and a bias) and nothing else, so that it can be taken tile by tile.

        An adapter or a quantised head has a forward of its own, and hooks may change what goes in or comes out; those
        of FSDP only gather the weights, and ``fused`` goes through them.
        """
        head = self.head
        if not self.exact or head is None or getattr(type(head), "forward", None) is not nn.Linear.forward:
            return False
        return isinstance(head, FSDPModule) or not (head._forward_hooks or head._forward_pre_hooks)

    def fused(self, hidden: Tensor, targets: Tensor, temperature: float, **options: Any) -> TokenScores:
        """``objective.chunked.chunked_logprobs`` with this head; only where ``plain``. ``options`` go to it."""
        head = self.head
        assert self.plain
        assert isinstance(head, nn.Linear)

        def forward(states: Tensor) -> tuple[Tensor | None, ...]:
            found = chunked_logprobs(
                states, head.weight, targets, temperature, bias=head.bias, tail=self._tail, **options
            )
            return found.logprobs, found.entropy, found.extra_logprobs, found.id_logprobs, found.rest_logprobs

        if not isinstance(head, FSDPModule):
            found = forward(hidden)
        else:
            # The weights are whole only between the hooks around the module's own forward, and in the backward pass
            # only if those hooks see the outputs: a plain tuple of tensors.
            head.__dict__["forward"] = forward
            try:
                found = head(hidden)
            finally:
                del head.__dict__["forward"]
        logprobs, *others = found
        assert logprobs is not None
        return TokenScores(logprobs, *others)

    @torch.no_grad()
    def top(
        self, hidden: Tensor, k: int, temperature: float = 1.0, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest ids, their log-probs and that of all others: ``objective.chunked.chunked_topk``.

        Args:
            hidden: [T, H].
            k: no more than ``vocabulary``.
            temperature: > 0.
            excluded: I[X], ascending, ids that take no part.
        """
        head = self.head
        if self.plain and isinstance(head, nn.Linear) and not isinstance(head, FSDPModule):
            return chunked_topk(hidden, head.weight, k, temperature, bias=head.bias, tail=self._tail, excluded=excluded)

        def reduce(logits: Tensor) -> tuple[Tensor, ...]:
            scaled = tempered(logits, temperature)
            if excluded is not None:
                scaled = scaled.index_fill(-1, excluded, -torch.inf)
            log_z = scaled.logsumexp(-1)
            values, ids = scaled.topk(k, dim=-1)
            rest = _rest(scaled, ids, None, log_z)
            return ids.masked_fill(values == -torch.inf, -1), values - log_z[:, None], rest

        ids, logprobs, rest = map_logits(self, hidden, reduce)
        return ids, logprobs, rest

    @torch.no_grad()
    def _find_tail(self) -> Tail | None:
        """What follows the head's matrix in the model's own forward; None when it could not be reproduced."""
        if self.head is None or self.backbone is self.model:
            return None
        device = next(self.model.parameters()).device
        ids = torch.linspace(0, self.model.get_input_embeddings().num_embeddings - 1, 8, device=device).long()[None]
        expected = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        candidates = list(_tails(self.model.config.get_text_config()))
        for factor in (1.0, 30.0):
            seen: list[Tensor] = []

            def amplify(
                module: nn.Module, inputs: tuple[Tensor, ...], factor: float = factor, seen: list[Tensor] = seen
            ) -> tuple[Tensor, ...]:
                seen.append(inputs[0])
                return (inputs[0] * factor, *inputs[1:])

            handle = self.head.register_forward_pre_hook(amplify)
            try:
                own = self.model(input_ids=ids, use_cache=False).logits
            finally:
                handle.remove()
            if len(seen) != 1 or not _same(seen[0], expected):
                return None
            raw = self.head(expected * factor)
            candidates = [tail for tail in candidates if _same(tail(raw), own)]
        return candidates[0] if candidates else None


def response_logprobs(
    model: PreTrainedModel | HeadView,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    temperature: float = 1.0,
    *,
    extra_temperature: float | None = None,
    ids: Tensor | None = None,
    rest: bool = False,
    chunk_tokens: int | None = None,
    entropy: bool = True,
) -> TokenScores:
    """Log-probs of the tokens at ``positions``: log softmax(logits / temperature)[token], from one forward pass.

    Args:
        model: a causal LM or its ``HeadView`` (make the view once where calls repeat).
        input_ids: I[B, L].
        attention_mask: I[B, L], or None when padding is on the right (see ``HeadView.hidden``).
        positions: I[T, 2] of (row, column) of the predicted tokens.
        temperature: > 0.
        extra_temperature: a second temperature for the same hidden states, without gradient.
        ids: I[T, K], further ids at each position whose log-probs are wanted.
        rest: whether the log-mass of all but those ids, which must then be distinct, is wanted too.
        chunk_tokens: tokens projected at once; None leaves the choice to ``objective.chunked`` where the head is
            plain, and else lets a chunk hold ``CHUNK_LOGITS`` logits. The result does not depend on it beyond rounding.
        entropy: False leaves the entropy out.

    Returns:
        ``TokenScores`` in float32 (float64 for a float64 model). Logits that fit into one chunk (of ``KEPT_LOGITS``
        where none was asked for) are kept for the backward pass; of more than one chunk each is computed again there.
    """
    view = model if isinstance(model, HeadView) else HeadView(model)
    return score_hidden(
        view,
        view.response_hidden(input_ids, attention_mask, positions),
        input_ids[positions[:, 0], positions[:, 1]],
        temperature,
        extra_temperature=extra_temperature,
        ids=ids,
        rest=rest,
        chunk_tokens=chunk_tokens,
        entropy=entropy,
    )


def score_hidden(
    view: HeadView,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    extra_temperature: float | None = None,
    ids: Tensor | None = None,
    rest: bool = False,
    excluded: Tensor | None = None,
    chunk_tokens: int | None = None,
    entropy: bool = True,
) -> TokenScores:
    """``response_logprobs`` where the hidden states are there already.

    Args:
        view: supplies the projection.
        hidden: [T, H], from ``HeadView.response_hidden``.
        targets: I[T], the tokens whose log-probs are wanted.
        temperature, extra_temperature, chunk_tokens, entropy: as for ``response_logprobs``.
        ids, rest, excluded: as for ``objective.chunked.chunked_logprobs``.
    """
    kept = max(1, KEPT_LOGITS // view.vocabulary) if chunk_tokens is None else chunk_tokens
    if hidden.shape[0] > kept >= 1 and view.plain:
        return view.fused(
            hidden,
            targets,
            temperature,
            ids=ids,
            rest=rest,
            excluded=excluded,
            extra_temperature=extra_temperature,
            entropy=entropy,
            tile_tokens=chunk_tokens,
        )

    def score(logits: Tensor, wanted: Tensor, *further: Tensor) -> tuple[Tensor, ...]:
        scaled = tempered(logits, temperature)
        log_z = scaled.logsumexp(-1)
        outputs = [token_logprobs(scaled, wanted, log_z=log_z)]
        for more in further:
            found = scaled.gather(-1, more.clamp_min(0)) - log_z[:, None]
            outputs.append(found.masked_fill(more < 0, -torch.inf))
            outputs.append(_rest(scaled, more, excluded, log_z) if rest else log_z)
        # After the part with gradient, so that recomputation in the backward pass stops before it.
        with torch.no_grad():
            if entropy:
                outputs.append(token_entropy(scaled, log_z=log_z))
            if extra_temperature is not None:
                outputs.append(token_logprobs(logits, wanted, extra_temperature))
        return tuple(outputs)

    per_token = (targets,) if ids is None else (targets, ids)
    found = list(map_logits(view, hidden, score, *per_token, chunk_tokens=chunk_tokens))
    return TokenScores(
        logprobs=found.pop(0),
        id_logprobs=None if ids is None else found.pop(0),
        rest_logprobs=None if ids is None else _only(rest, found.pop(0)),
        entropy=found.pop(0) if entropy else None,
        extra_logprobs=found.pop(0) if extra_temperature is not None else None,
    )


def _rest(scaled: Tensor, ids: Tensor, excluded: Tensor | None, log_z: Tensor) -> Tensor:
    """The log-mass of all ids but those of each row and the excluded, where there is none that of the least number."""
    # One column more takes the ids of -1.
    out = torch.zeros(scaled.shape[0], scaled.shape[1] + 1, dtype=torch.bool, device=scaled.device)
    out.scatter_(-1, torch.where(ids < 0, scaled.shape[1], ids), True)
    if excluded is not None:
        out.index_fill_(-1, excluded, True)
    rest = scaled.masked_fill(out[:, :-1], -torch.inf).logsumexp(-1) - log_z
    return rest.clamp_min(math.log(torch.finfo(scaled.dtype).tiny))


def _only(wanted: bool, value: Tensor) -> Tensor | None:
    return value if wanted else None


def map_logits(
    view: HeadView,
    hidden: Tensor,
    reduce: Callable[..., tuple[Tensor, ...]],
    *per_token: Tensor,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """Apply ``reduce(logits [c, V], *per_token chunks) -> tensors [c, ...]`` over chunks of tokens; join the results.

    With gradient enabled and more than one chunk, chunks are checkpointed: nothing of size [c, V] survives its chunk.
    A single chunk is kept, for recomputing it would bound nothing.

    Args:
        view: supplies the projection.
        hidden: [T, H], from ``HeadView.response_hidden``.
        per_token: tensors [T, ...] cut in the same places (targets, a teacher's hidden states ...).
        chunk_tokens: tokens a chunk; None as in ``response_logprobs``.

    Raises:
        ValueError: chunk_tokens < 1.
    """
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS // view.vocabulary)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens}, expected at least 1")

    def run(chunk: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return reduce(view.project(chunk), *others)

    total = hidden.shape[0]
    if total <= chunk_tokens:
        return run(hidden, *per_token)
    pieces: list[tuple[Tensor, ...]] = []
    for start in range(0, total, chunk_tokens):
        part = [tensor[start : start + chunk_tokens] for tensor in (hidden, *per_token)]
        if torch.is_grad_enabled():
            pieces.append(checkpoint(run, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(run(*part))
    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


def _tails(config: Any) -> Iterator[Tail]:
    """What may follow the head's matrix, by the names that configs give to it.

    ``final_logit_softcapping`` and ``softcap`` (Gemma 2 and later): cap x tanh(z / cap). ``logit_scale`` (Cohere): a
    factor. ``logits_scaling``: a divisor (Granite) or a factor (HyperCLOVA X). The check decides which it is.
    """
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "softcap", None)
    factor = getattr(config, "logit_scale", None)
    scaling = getattr(config, "logits_scaling", None)
    if cap:
        yield Tail(cap=cap)
    if factor:
        yield Tail(scale=factor)
    if scaling:
        yield Tail(scale=1.0 / scaling)
        yield Tail(scale=scaling)
    yield Tail()


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal up to the rounding of the coarser dtype, relative to the largest entry."""
    if left.shape != right.shape:
        return False
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3}.get(
        max((left.dtype, right.dtype), key=lambda dtype: torch.finfo(dtype).eps), 3e-2
    )
    left, right = left.double(), right.double()
    return bool((left - right).abs().max() <= tolerance * right.abs().max())
