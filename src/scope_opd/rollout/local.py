"""The in-process sampler: responses of any Hugging Face causal LM whose cache can drop rows.

Prompts of like length share a decode batch, padded on the left; every prompt is read once and its cache handed to its
n samples; rows that ended leave the batch when an eighth of it is idle. Each token is drawn by inverting the CDF of
the distribution after repetition penalty, temperature, top-k and top-p (in that order), with a uniform that depends on
(seed, step, prompt id, sample, position) alone: another ``max_rows`` gives the same tokens except where a uniform
falls within rounding of a boundary, and an identical call gives identical bits. The schedule is a function of what is
sampled, never of a clock or of the consumer.

Not covered: refilling a running batch with waiting prompts, recurrent (state-space) models, encoder-decoder models.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from scope_opd.errors import ModelError, RunFailed, ScopeError
from scope_opd.models.loading import context_length
from scope_opd.rollout.drawing import draw
from scope_opd.rollout.random import rollout_keys, uniforms
from scope_opd.types import FinishReason, Prompt, Rollout, SamplingParams

# Rows that ended stay until they are this share of the batch: dropping them copies the cache.
IDLE_SHARE = 0.125
# Decode steps between looks at the finished rows, by device type: looking makes the host wait for a GPU.
BURST = {"cpu": 1}
_BURST_ELSEWHERE = 8
# Positions for which uniforms are made at once.
_UNIFORM_BLOCK = 64


class LocalSampler:
    """Draws responses with a model in this process; implements ``types.Sampler``.

    Args:
        model: a causal LM in eval mode. It may be trained between calls: nothing of it is copied or kept.
        tokenizer: decodes responses to ``Rollout.text``.
        max_rows: sequences decoded at once; None decodes all of a call together.
        autocast: forward passes run under autocast to this dtype; None runs in the model's own. Logits are handled
            in float32 either way (float64 for a float64 model).
        vocabulary: only ids below it are drawn: the logits of the others are -inf before anything else is done to
            them, and log-probs are those of that distribution. None: every row of the head.

    Raises:
        ModelError: a cache from which rows cannot be selected.
        ScopeError: max_rows or vocabulary < 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int | None = None,
        autocast: torch.dtype | None = None,
        vocabulary: int | None = None,
    ) -> None:
        if vocabulary is not None and vocabulary < 1:
            raise ScopeError(f"vocabulary = {vocabulary}", "at least 1", "leave it out")
        if max_rows is not None and max_rows < 1:
            raise ScopeError(f"max_rows = {max_rows}", "at least 1", "raise rollout.max_rows or leave it out")
        odd = [type(layer).__name__ for layer in _new_cache(model).layers if not isinstance(layer, DynamicLayer)]
        if odd:
            raise ModelError(
                f"model {model.config.model_type!r} keeps its past in {odd[0]}",
                "attention caches only",
                "sample it with a server",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.autocast = autocast
        self.vocabulary = vocabulary

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        """Yield ``params.n`` rollouts for each prompt as they end.

        Computes on the thread of the event loop and gives control back after every decode step (eight on a GPU).

        Raises:
            ScopeError: a prompt that is empty, doubled, too long for the response asked for, or has ids that the
                model lacks; settings out of range. All before anything is sampled.
            RunFailed: the model's logits are NaN.
        """
        assert not self.model.training, "dropout and gradient checkpointing would change what is sampled"
        self._check(prompts, params)
        settings = {
            "temperature": params.temperature,
            "seed": params.seed,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "repetition_penalty": params.repetition_penalty,
            "max_tokens": params.max_tokens,
        }
        for rows in self._cut(prompts, params.n):
            batch = _DecodeBatch(self.model, rows, params, step, self.autocast, self.vocabulary)
            while not batch.done:
                ended = batch.advance()
                responses = [tokens for _, tokens, _ in ended]
                texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True) if ended else []
                for ((prompt, sample), tokens, logprobs), text in zip(ended, texts, strict=True):
                    reason: FinishReason = "stop" if tokens[-1] in params.stop_token_ids else "length"
                    yield Rollout(
                        id=f"{prompt.id}/{step}/{sample}",
                        group=prompt.id,
                        prompt_token_ids=list(prompt.token_ids),
                        token_ids=tokens,
                        logprobs=logprobs,
                        text=text,
                        finish_reason=reason,
                        policy_version=policy_version,
                        sample=sample,
                        step=step,
                        sampling=dict(settings),
                    )
                await asyncio.sleep(0)

    def _cut(self, prompts: Sequence[Prompt], n: int) -> list[list[tuple[Prompt, int]]]:
        """(prompt, sample) rows by decode batch: longest prompts first, a group kept together where it fits."""
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].token_ids), index))
        rows = [(prompts[index], sample) for index in order for sample in range(n)]
        size = self.max_rows or max(1, len(rows))
        if size > n:
            size -= size % n
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        for name, found, right, expected in (
            ("n", params.n, params.n >= 1, "at least 1"),
            ("max_tokens", params.max_tokens, params.max_tokens >= 1, "at least 1"),
            ("temperature", params.temperature, 0 < params.temperature < float("inf"), "a number > 0"),
            ("top_p", params.top_p, 0 < params.top_p <= 1, "0 < top_p <= 1"),
            ("top_k", params.top_k, params.top_k >= 0, "at least 0 (0 is off)"),
            ("repetition_penalty", params.repetition_penalty, params.repetition_penalty > 0, "a number > 0"),
        ):
            if not right:
                raise ScopeError(f"{name} = {found}", expected, f"change {name}")
        limit = context_length(self.model.config)
        rows = self.model.get_input_embeddings().num_embeddings
        seen: set[str] = set()
        for prompt in prompts:
            length = len(prompt.token_ids)
            if prompt.id in seen:
                raise ScopeError(f"prompt {prompt.id!r} comes twice", "unique prompt ids", "drop or rename one")
            seen.add(prompt.id)
            if not length:
                raise ScopeError(f"prompt {prompt.id!r} has no tokens", "at least one", "drop it, or mend the template")
            if not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < rows:
                raise ScopeError(
                    f"prompt {prompt.id!r} holds token id {max(prompt.token_ids)}",
                    f"ids below the model's {rows}",
                    "use the model's own tokenizer",
                )
            if limit is not None and length + params.max_tokens > limit:
                raise ScopeError(
                    f"prompt {prompt.id!r}: {length} tokens and up to {params.max_tokens} of response",
                    f"at most the model's context of {limit}",
                    f"lower rollout.max_tokens to {limit - length}"
                    if length < limit
                    else "drop the prompt (data.max_prompt_tokens)",
                )


class _DecodeBatch:
    """Rows decoded together; R counts those still in it, t the tokens drawn so far.

    State a row: key, position, finished, length; buffers tokens and logprobs [capacity, R]; the cache; the mask
    [R, prompt width + max_tokens] (None while no row is padded).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[tuple[Prompt, int]],
        params: SamplingParams,
        step: int,
        autocast: torch.dtype | None,
        vocabulary: int | None,
    ) -> None:
        self.model, self.rows, self.params = model, rows, params
        self.vocabulary = vocabulary
        self.device = next(model.parameters()).device
        self.autocast = autocast
        self.burst = BURST.get(self.device.type, _BURST_ELSEWHERE)
        self.accepts = inspect.signature(model.forward).parameters
        self.t = 0
        self.done = False
        self.reported = [False] * len(rows)
        self.keys = rollout_keys(params.seed, step, ((prompt.id, sample) for prompt, sample in rows)).to(self.device)
        self.uniforms: Tensor | None = None
        self.finished = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        self.length = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        self.logits: Tensor | None = None

    @torch.inference_mode()
    def advance(self) -> list[tuple[tuple[Prompt, int], list[int], list[float]]]:
        """Decode one step (a burst of them on a GPU); return the rows that ended: (row, token ids, log-probs)."""
        context: Any = contextlib.nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.device.type, dtype=self.autocast)
        with context:
            logits = self._prefill() if self.logits is None else self.logits
            for index in range(self.burst):
                token = self._draw(logits)
                self.t += 1
                if self.t == self.params.max_tokens:
                    break
                if index + 1 < self.burst:
                    logits = self._forward(token)
            ended = self._collect()
            if not self.done:
                self.logits = self._forward(self._compact(token))
        return ended

    def _prefill(self) -> Tensor:
        """Read every prompt once, hand its cache to its samples. Returns logits [R, V] of the first tokens."""
        prompts: dict[str, Prompt] = {prompt.id: prompt for prompt, _ in self.rows}
        width = max(len(prompt.token_ids) for prompt in prompts.values())
        lengths = [len(prompt.token_ids) for prompt in prompts.values()]
        ids = torch.tensor(
            [[0] * (width - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in prompts.values()],
            device=self.device,
        )
        start = torch.tensor(lengths, device=self.device)[:, None]
        position = torch.arange(width, device=self.device)[None, :] - (width - start)
        mask = (position >= 0).long()
        padded = min(lengths) < width
        self.cache = _new_cache(self.model)
        logits = self._model(ids, mask if padded else None, position.clamp_min(0))
        place = {identity: index for index, identity in enumerate(prompts)}
        owner = torch.tensor([place[prompt.id] for prompt, _ in self.rows], device=self.device)
        if len(prompts) != len(self.rows):
            self.cache.batch_select_indices(owner)
        self.width = width
        self.position = start[owner]
        self.mask = None
        if padded:
            tail = torch.ones(len(prompts), self.params.max_tokens, dtype=torch.long, device=self.device)
            self.mask = torch.cat((mask, tail), dim=1)[owner]
        vocabulary = logits.shape[-1]
        self.ends = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self.ends[[token for token in self.params.stop_token_ids if 0 <= token < vocabulary]] = True
        self.seen = None
        if self.params.repetition_penalty != 1.0:
            seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=self.device)
            # Padding is counted as the prompt's last token, which is there anyway, so that it adds nothing.
            self.seen = seen.scatter_(1, torch.where(mask.bool(), ids, ids[:, -1:]), True)[owner]
        capacity = min(self.params.max_tokens, _UNIFORM_BLOCK)
        precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.tokens = torch.zeros(capacity, len(self.rows), dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(capacity, len(self.rows), dtype=precision, device=self.device)
        return logits[owner]

    def _forward(self, token: Tensor) -> Tensor:
        """Feed the last tokens I[R]; return logits [R, V] of the next."""
        mask = None if self.mask is None else self.mask[:, : self.width + self.t]
        logits = self._model(token[:, None], mask, self.position)
        self.position = self.position + 1
        return logits

    def _model(self, ids: Tensor, mask: Tensor | None, position: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": self.cache, "use_cache": True}
        if mask is not None:
            inputs["attention_mask"] = mask
        if "position_ids" in self.accepts:
            inputs["position_ids"] = position
        if "logits_to_keep" in self.accepts:
            inputs["logits_to_keep"] = 1
        logits = self.model(**inputs).logits[:, -1]
        if self.vocabulary is not None and self.vocabulary < logits.shape[-1]:
            beyond = torch.arange(logits.shape[-1], device=logits.device) >= self.vocabulary
            logits = logits.masked_fill(beyond, -torch.inf)
        return logits

    def _draw(self, logits: Tensor) -> Tensor:
        """Draw token t of every row, record it and its log-prob."""
        offset = self.t % _UNIFORM_BLOCK
        if offset == 0:
            self.uniforms = uniforms(self.keys, self.t, min(_UNIFORM_BLOCK, self.params.max_tokens - self.t))
        if self.t == len(self.tokens):
            more = min(len(self.tokens), self.params.max_tokens - self.t)
            self.tokens = torch.cat((self.tokens, torch.zeros_like(self.tokens[:more])))
            self.logprobs = torch.cat((self.logprobs, torch.zeros_like(self.logprobs[:more])))
        assert self.uniforms is not None
        token, logprob = draw(logits, self.uniforms[offset], self.params, self.seen)
        self.tokens[self.t] = token
        self.logprobs[self.t] = logprob
        self.length += ~self.finished
        self.finished |= self.ends[token]
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        return token

    def _collect(self) -> list[tuple[tuple[Prompt, int], list[int], list[float]]]:
        """Rows that ended since the last look; sets ``done``."""
        over = self.t == self.params.max_tokens
        finished = self.finished.tolist()
        new = [row for row, ended in enumerate(finished) if (ended or over) and not self.reported[row]]
        self.done = over or all(finished)
        if not new:
            return []
        index = torch.tensor(new, device=self.device)
        tokens = self.tokens[: self.t].index_select(1, index).T.tolist()
        logprobs = self.logprobs[: self.t].index_select(1, index).T.tolist()
        ended = []
        for row, length, ids, values in zip(new, self.length[index].tolist(), tokens, logprobs, strict=True):
            self.reported[row] = True
            prompt, sample = self.rows[row]
            bad = next((place for place, value in enumerate(values[:length]) if value != value), None)
            if bad is not None:
                raise RunFailed(
                    f"prompt {prompt.id!r}, sample {sample}: log-prob NaN at response token {bad}",
                    "finite logits",
                    "the weights or the precision are broken: go back to an earlier checkpoint",
                )
            ended.append((self.rows[row], ids[:length], values[:length]))
        return ended

    def _compact(self, token: Tensor) -> Tensor:
        """Let finished rows leave where enough of them idle; returns the tokens of those that stay."""
        stay = [row for row, reported in enumerate(self.reported) if not reported]
        if len(self.reported) - len(stay) < max(1, IDLE_SHARE * len(self.reported)):
            return token
        keep = torch.tensor(stay, device=self.device)
        self.cache.batch_select_indices(keep)
        self.rows = [self.rows[row] for row in stay]
        self.reported = [False] * len(stay)
        self.keys, self.position = self.keys[keep], self.position[keep]
        self.finished, self.length = self.finished[keep], self.length[keep]
        self.tokens, self.logprobs = self.tokens[:, keep], self.logprobs[:, keep]
        assert self.uniforms is not None
        self.uniforms = self.uniforms[:, keep]
        if self.mask is not None:
            self.mask = self.mask[keep]
        if self.seen is not None:
            self.seen = self.seen[keep]
        return token[keep]


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the layers that the model's config asks for (sliding windows keep their window alone)."""
    return DynamicCache(config=model.config)
