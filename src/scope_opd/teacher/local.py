"""The in-process teacher: log-probs of given responses from a causal LM, in batches under a token budget.

Rollouts are sorted by length, padded on the right and cut by ``models.batching``, so the batches of a step are a
function of the step; full-vocabulary logits exist for a chunk of tokens at a time. Sequences that differ only in their
response share no work. Where an update wants whole distributions, the hidden states of what was scored can be kept for
it. Not covered: teachers behind HTTP, top-k rows.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scope_opd.errors import ModelError, RunFailed, ScopeError
from scope_opd.models.batching import microbatches, pad_right, response_positions
from scope_opd.models.head import HeadView, score_hidden
from scope_opd.models.loading import context_length
from scope_opd.models.packing import packs_exactly
from scope_opd.models.rows import Rows
from scope_opd.objective.logprobs import tempered
from scope_opd.teacher.ends import EndTokens
from scope_opd.teacher.kept import KeptHidden
from scope_opd.types import Rollout, TeacherScore


class LocalTeacher:
    """Scores rollouts with a model in this process; implements ``types.Teacher``.

    Args:
        model: a causal LM in eval mode, in the dtype that it shall compute in.
        temperature: logits are divided by it: the sampling temperature for the convention ``matched``, else 1.
        max_tokens_per_batch: prompt + response tokens of one forward pass, padding included.
        log_prob_floor: log-probs below it (-inf too) are raised to it and counted.
        chunk_tokens: tokens projected to the vocabulary at once; None as in ``models.head``.
        ends: what to do where it ends responses with other tokens than the student; None: score them as any token.
        keep_bytes: of hidden states of the rollouts scored last, kept on the host for ``response_hidden``; 0: none.

    Attributes:
        streams: False: all rollouts of a step are scored together.
        view: the teacher's ``HeadView``.

    Raises:
        ScopeError: a setting out of range.
    """

    streams: bool = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float = 1.0,
        max_tokens_per_batch: int = 8192,
        log_prob_floor: float = -100.0,
        chunk_tokens: int | None = None,
        ends: EndTokens | None = None,
        keep_bytes: int = 0,
    ) -> None:
        for name, found, right, expected in (
            ("temperature", temperature, 0 < temperature < math.inf, "a number > 0"),
            ("max_tokens_per_batch", max_tokens_per_batch, max_tokens_per_batch >= 1, "at least 1"),
            ("log_prob_floor", log_prob_floor, -math.inf < log_prob_floor < 0, "a finite number < 0"),
        ):
            if not right:
                raise ScopeError(f"teacher {name} = {found}", expected, f"change teacher.{name}")
        self.view = HeadView(model)
        self.temperature = temperature
        self.max_tokens_per_batch = max_tokens_per_batch
        self.log_prob_floor = log_prob_floor
        self.chunk_tokens = chunk_tokens
        self.ends = ends
        self._rows = min(model.get_input_embeddings().num_embeddings, self.view.vocabulary)
        self._context = context_length(model.config)
        self._device = next(model.parameters()).device
        self._packs: bool | None = None
        self._kept = KeptHidden(keep_bytes) if keep_bytes > 0 else None

    async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        """Log-prob of every response token, log softmax(logits / temperature)[token], floored; one score a rollout.

        A rollout with a token that the teacher has no row for cannot be scored: its ``logprobs`` are None. Computes
        on the thread of the event loop and gives control back after every batch. Hidden states that were kept of an
        earlier call are let go.

        Raises:
            ModelError: a rollout longer than the teacher's context.
            RunFailed: a log-prob is NaN; names the rollout.
        """
        if self._kept is not None:
            self._kept.clear()
        scores = [TeacherScore(logprobs=None)] * len(rollouts)
        known = [index for index, rollout in enumerate(rollouts) if self._can_score(rollout)]
        lengths = [len(rollouts[index].prompt_token_ids) + len(rollouts[index].token_ids) for index in known]
        for batch in microbatches(lengths, self.max_tokens_per_batch):
            members = [known[place] for place in batch]
            for index, score in zip(members, self._score_batch([rollouts[index] for index in members]), strict=True):
                scores[index] = score
            await asyncio.sleep(0)
        return scores

    @torch.no_grad()
    def response_hidden(self, rows: Rows, positions: Tensor) -> Tensor:
        """Hidden states that predict the tokens at ``positions``, without gradient: [T, H], for ``project``.

        Those that were kept when their rollout was scored are not computed again.

        Args:
            rows: on the teacher's device. Packed ones are padded where the teacher cannot take packs.
            positions: I[T, 2] of (row, column) of the predicted tokens.
        """
        if self._kept is None or not len(self._kept):
            return self._read(rows, positions)
        owner, place = rows.owners(positions)
        found = [self._kept.get(sequence) for sequence in rows.sequences()]
        kept = [hidden for hidden in found if hidden is not None]
        if not kept:
            return self._read(rows, positions)
        # Laid end to end, where each sequence's first token would stand, and the first that is covered.
        starts, covered, end = [], [], 0
        for hidden, length in zip(found, rows.lengths, strict=True):
            count = 0 if hidden is None else len(hidden)
            end += count
            starts.append(end - length)
            covered.append(length - count)
        known = place >= torch.tensor(covered, device=place.device)[owner]
        ready = (torch.tensor(starts, device=place.device)[owner] + place)[known]
        hidden = torch.cat(kept)[ready.cpu()].to(self._device)
        if known.all():
            return hidden
        whole = hidden.new_empty(len(positions), hidden.shape[1])
        whole[known] = hidden
        whole[~known] = self._read(*rows.touched(positions[~known])).to(hidden.dtype)
        return whole

    def _read(self, rows: Rows, positions: Tensor) -> Tensor:
        if rows.packed is not None:
            if self._packs is None:
                self._packs = packs_exactly(self.view)
            if not self._packs:
                rows, positions = rows.touched(positions, packed=False)
        # An id without a row can only be an end token that is excluded: it is the last, so that nothing is read there.
        return rows.below(self._rows).response_hidden(self.view, positions)

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:
        """Logits / temperature of hidden states, without gradient: F32[T, V] (float64 for a float64 model)."""
        return tempered(self.view.project(hidden), self.temperature)

    @property
    def vocabulary(self) -> int:
        """The size of its logit vectors."""
        return self.view.vocabulary

    @torch.no_grad()
    def top(self, hidden: Tensor, k: int, excluded: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``HeadView.top`` of hidden states at the teacher's temperature, without gradient."""
        return self.view.top(hidden, k, self.temperature, excluded)

    def _can_score(self, rollout: Rollout) -> bool:
        length = len(rollout.prompt_token_ids) + len(rollout.token_ids)
        if self._context is not None and length > self._context:
            raise ModelError(
                f"rollout {rollout.id!r} has {length} tokens with its prompt",
                f"at most the teacher's context of {self._context}",
                "lower rollout.max_tokens or data.max_prompt_tokens",
            )
        assert rollout.prompt_token_ids, f"rollout {rollout.id} has no prompt"
        return max(max(rollout.prompt_token_ids), max(self._response(rollout), default=0)) < self._rows

    def _response(self, rollout: Rollout) -> list[int]:
        return rollout.token_ids if self.ends is None else self.ends.scored(rollout)

    @torch.no_grad()
    def _score_batch(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        input_ids, _ = pad_right(
            [[*rollout.prompt_token_ids, *self._response(rollout)] for rollout in rollouts], device=self._device
        )
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        positions = response_positions([len(rollout.prompt_token_ids) for rollout in rollouts], lengths, self._device)
        hidden = self.view.response_hidden(input_ids, None, positions)
        found = score_hidden(
            self.view,
            hidden,
            input_ids[positions[:, 0], positions[:, 1]],
            self.temperature,
            chunk_tokens=self.chunk_tokens,
            entropy=False,
        )
        if self._kept is not None:
            for rollout, own in zip(rollouts, hidden.split(lengths), strict=True):
                self._kept.put([*rollout.prompt_token_ids, *rollout.token_ids], own)
        scores = []
        for rollout, values in zip(rollouts, found.logprobs.cpu().split(lengths), strict=True):
            self._refuse_nan(rollout, values)
            mask = None if self.ends is None else self.ends.mask(rollout)
            used = values if mask is None else values[torch.tensor(mask, dtype=torch.bool)]
            floored = int((used < self.log_prob_floor).sum())
            scores.append(TeacherScore(values.clamp_min(self.log_prob_floor).tolist(), floored, mask=mask))
        return scores

    @staticmethod
    def _refuse_nan(rollout: Rollout, values: Tensor) -> None:
        bad = values.isnan()
        if bad.any():
            raise RunFailed(
                f"rollout {rollout.id!r}: the teacher's log-prob of response token {int(bad.nonzero()[0])} is NaN",
                "a finite number or -inf",
                "check the teacher's weights, or load it in float32 (teacher.dtype)",
            )
