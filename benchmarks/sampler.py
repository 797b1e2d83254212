"""The in-process sampler against ``model.generate`` on the same work.

    python benchmarks/sampler.py [--threads 1] [--repeats 7] [--device cpu]

A random Qwen3 (hidden 64, 2 layers, vocabulary 64), 16 prompts x 8 samples and 128 prompts x 1, two kinds of length:
``fixed``, 36 tokens a response with no end token, and ``ragged``, an end token after 36 tokens on average and at most
63. Prompts have 9 to 15 tokens. ``generate`` only samples; ours records log-probs and decodes the text too. Both run
interleaved; the medians are compared. Prints one JSON line: ``ratio`` is ours / generate in time for equal tokens,
below 1 when ours is faster.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from scope_opd.rollout.local import LocalSampler
from scope_opd.types import Prompt, SamplingParams

VOCABULARY, END, TOKENS, LONGEST, TEMPERATURE = 64, 1, 36, 63, 0.6


def build(device: str) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A random model with untouched weights, and a tokenizer of 64 words."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), pad_token="w0")
    return Qwen3ForCausalLM(config).eval().to(device), tokenizer


def measure(work: dict[str, Callable[[], int]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Run all kinds of work in turn; medians of time and of time a token."""
    times: dict[str, list[float]] = {name: [] for name in work}
    each: dict[str, list[float]] = {name: [] for name in work}
    for index in range(repeats + 1):
        for name, job in work.items():
            start = time.perf_counter()
            tokens = job()
            if device != "cpu":
                torch.cuda.synchronize()
            if index:  # the first round warms up
                times[name].append(time.perf_counter() - start)
                each[name].append((time.perf_counter() - start) / tokens)
    return {
        name: {"seconds": statistics.median(times[name]), "us_per_token": 1e6 * statistics.median(each[name])}
        for name in work
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = build(options.device)
    sampler = LocalSampler(model, tokenizer)
    result: dict[str, Any] = {"benchmark": "sampler", **vars(options)}
    draw, seeds = random.Random(0), iter(range(10_000))
    for count, n in ((16, 8), (128, 1)):
        prompts = [
            Prompt(id=f"p{i}", problem="", answer="", token_ids=tuple(draw.randrange(3, 64) for _ in range(length)))
            for i, length in enumerate(draw.randint(9, 15) for _ in range(count))
        ]
        width = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts])
        ids, mask = ids.to(options.device), mask.to(options.device)
        for kind, longest, ends in (("fixed", TOKENS, ()), ("ragged", LONGEST, (END,))):

            def ours(n: int = n, longest: int = longest, ends: tuple[int, ...] = ends, prompts: Any = prompts) -> int:
                params = SamplingParams(
                    n=n, temperature=TEMPERATURE, max_tokens=longest, stop_token_ids=ends, seed=next(seeds)
                )

                async def run() -> int:
                    stream = sampler.sample(prompts, params, step=0, policy_version=0)
                    return sum([len(rollout.token_ids) async for rollout in stream])

                return asyncio.run(run())

            def theirs(
                n: int = n, longest: int = longest, ends: tuple[int, ...] = ends, ids: Any = ids, mask: Any = mask
            ) -> int:
                torch.manual_seed(next(seeds))
                output = model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=n,
                    max_new_tokens=longest,
                    eos_token_id=list(ends) or None,
                    pad_token_id=0,
                )
                response = output[:, ids.shape[1] :]
                if not ends:
                    return response.numel()
                ended = (response == END).cumsum(1)
                return int(((ended == 0) | ((ended == 1) & (response == END))).sum())

            figures = measure({"ours": ours, "generate": theirs}, options.repeats, options.device)
            figures["ratio"] = figures["ours"]["us_per_token"] / figures["generate"]["us_per_token"]  # type: ignore[assignment]
            result[f"{count}x{n}_{kind}"] = figures
    result["ratio"] = result["16x8_fixed"]["ratio"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
