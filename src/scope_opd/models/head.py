"""Log-probs of response tokens from any Hugging Face causal LM, without a full-vocabulary tensor beyond a chunk.

A causal LM is a backbone (ids to hidden states) and a head (hidden states to logits: a matrix, perhaps a bias, a scale
or a soft-cap). ``HeadView`` takes the two apart, so that only positions which predict a response token are projected,
a chunk at a time. It is checked against the model's own forward when it is made; where the two differ the model's own
full forward is used instead (``exact`` says which), which is right but keeps one logit tensor of a whole batch.

Not covered: encoder-decoder models, heads split over devices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from scope_opd.objective.logprobs import tempered, token_entropy, token_logprobs

# Logits in one chunk at most, when no chunk is asked for: 256 MiB in float32.
CHUNK_LOGITS = 2**26

Tail = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What ``response_logprobs`` returns; T is the number of positions asked for.

    Attributes:
        logprobs: F[T], log-prob of each token at ``temperature``; carries the gradient.
        entropy: F[T], entropy in nats of the distribution that predicts it, at ``temperature``; no gradient. None
            when not asked for.
        extra_logprobs: F[T], log-prob at ``extra_temperature``; no gradient. None when not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    extra_logprobs: Tensor | None


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
        self._tail: Tail = _identity
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

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the head projects, [B, L, H]. Where the view is not exact these are the logits themselves.

        Args:
            input_ids: I[B, L].
            attention_mask: I[B, L], 1 on tokens. None states that padding, if any, is on the right: with causal
                attention no token then sees padding, and no mask is needed.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
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
        chunk_tokens: tokens projected at once; None lets a chunk hold ``CHUNK_LOGITS`` logits. The result does not
            depend on it beyond rounding.
        entropy: False leaves the entropy out.

    Returns:
        ``TokenScores`` in float32 (float64 for a float64 model). With gradient enabled and more than one chunk, each
        chunk's logits are computed again in the backward pass instead of being kept.
    """
    view = model if isinstance(model, HeadView) else HeadView(model)
    return score_hidden(
        view,
        view.response_hidden(input_ids, attention_mask, positions),
        input_ids[positions[:, 0], positions[:, 1]],
        temperature,
        extra_temperature=extra_temperature,
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
    chunk_tokens: int | None = None,
    entropy: bool = True,
) -> TokenScores:
    """``response_logprobs`` where the hidden states are there already.

    Args:
        view: supplies the projection.
        hidden: [T, H], from ``HeadView.response_hidden``.
        targets: I[T], the tokens whose log-probs are wanted.
        temperature, extra_temperature, chunk_tokens, entropy: as for ``response_logprobs``.
    """

    def score(logits: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        scaled = tempered(logits, temperature)
        log_z = scaled.logsumexp(-1)
        outputs = [token_logprobs(scaled, wanted, log_z=log_z)]
        # After the part with gradient, so that recomputation in the backward pass stops before it.
        with torch.no_grad():
            if entropy:
                outputs.append(token_entropy(scaled, log_z=log_z))
            if extra_temperature is not None:
                outputs.append(token_logprobs(logits, wanted, extra_temperature))
        return tuple(outputs)

    results = map_logits(view, hidden, score, targets, chunk_tokens=chunk_tokens)
    return TokenScores(
        logprobs=results[0],
        entropy=results[1] if entropy else None,
        extra_logprobs=results[-1] if extra_temperature is not None else None,
    )


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


def _identity(logits: Tensor) -> Tensor:
    return logits


def _tails(config: Any) -> Iterator[Tail]:
    """What may follow the head's matrix, by the names that configs give to it.

    ``final_logit_softcapping`` and ``softcap`` (Gemma 2 and later): cap x tanh(z / cap). ``logit_scale`` (Cohere): a
    factor. ``logits_scaling``: a divisor (Granite) or a factor (HyperCLOVA X). The check decides which it is.
    """
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "softcap", None)
    factor = getattr(config, "logit_scale", None)
    scaling = getattr(config, "logits_scaling", None)
    if cap:
        yield lambda logits: torch.tanh(logits / cap) * cap
    if factor:
        yield lambda logits: logits * factor
    if scaling:
        yield lambda logits: logits / scaling
        yield lambda logits: logits * scaling
    yield _identity


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal up to the rounding of the coarser dtype, relative to the largest entry."""
    if left.shape != right.shape:
        return False
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3}.get(
        max((left.dtype, right.dtype), key=lambda dtype: torch.finfo(dtype).eps), 3e-2
    )
    left, right = left.double(), right.double()
    return bool((left - right).abs().max() <= tolerance * right.abs().max())
