"""Packed against padded micro-batches: forward and backward of a step's rollouts, and against dense masks and loops;
what of the ranks' time is lost where lengths have a long tail.

    python benchmarks/packing.py                   # the zoo's student, 128 sequences of 40-85 tokens
    python benchmarks/packing.py --shape small     # hidden 512, 8 layers, sequences of 64-512 tokens

Four ways through the backbone with the same loss: ``padded`` (micro-batches of like length, at most 5 % padding: what
training does where a model cannot be packed), ``packed`` (models.packing), ``dense`` (the same packs under a
block-diagonal SDPA mask), ``loop`` (one sequence at a time). They run in turn; figures are medians, time is CPU time of
the process with one thread, which a busy machine disturbs least. Prints one JSON line; ``ratio`` is packed / padded,
below 1 when packing is faster; ``waste`` is the share of 1 to 8 ranks' time spent waiting for the dearest pack
(``packing.waste``; nothing is padding), the worst of five draws: log-normal responses, a tenth at the limit of 12,288
tokens, budget 16,384, crossover of a Qwen2.5-1.5B.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from scope_opd.models.batching import microbatches, pad_right, padding_share, response_positions
from scope_opd.models.head import HeadView
from scope_opd.models.loading import load_model
from scope_opd.models.packing import crossover, deal, pack, packed_hidden, packs_exactly, waste

SHAPES = {
    "zoo": {"sequences": 128, "low": 40, "high": 85, "max_tokens": 2048},
    "small": {"sequences": 16, "low": 64, "high": 512, "max_tokens": 2048},
}


def waste_of_long_tails() -> dict[str, float]:
    """By "sequences x ranks"."""
    at = crossover(1_543_714_304, 28, 1536)
    found: dict[str, float] = {}
    for count in (128, 512):
        for ranks in (1, 2, 4, 8):
            shares = []
            for seed in range(5):
                draw = random.Random(seed)
                lengths = [
                    12_288 if draw.random() < 0.1 else min(12_288, 100 + int(draw.lognormvariate(7.5, 0.8)))
                    for _ in range(count)
                ]
                shares.append(waste(lengths, deal(lengths, 16_384, ranks=ranks, crossover=at), at))
            found[f"{count} x {ranks}"] = round(max(shares), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="zoo")
    parser.add_argument("--max-tokens", type=int, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["padded", "dense", "loop", "packed"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    budget = args.max_tokens or shape["max_tokens"]
    if args.shape == "zoo":
        model = load_model("zoo:student")
    else:
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=1024,
                hidden_size=512,
                intermediate_size=1536,
                num_hidden_layers=8,
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=64,
                max_position_embeddings=4096,
            )
        ).eval()
    view = HeadView(model)
    draw = random.Random(0)
    rows = model.get_input_embeddings().num_embeddings
    lengths = [draw.randint(shape["low"], shape["high"]) for _ in range(shape["sequences"])]
    sequences = [[draw.randrange(3, rows) for _ in range(length)] for length in lengths]
    padded = microbatches(lengths, budget)
    packs = [members for micro in deal(lengths, budget) for members in micro]

    def flat_padded(members: list[int]) -> torch.Tensor:
        ids, _ = pad_right([sequences[index] for index in members])
        places = response_positions([0] * len(members), [lengths[index] for index in members])
        return view.hidden(ids)[places[:, 0], places[:, 1]]

    def dense(members: list[int]) -> torch.Tensor:
        packed = pack([sequences[index] for index in members])
        return view.hidden(packed.input_ids, position_ids=packed.position_ids)[0]

    def loop(members: list[int]) -> torch.Tensor:
        return torch.cat([view.hidden(torch.tensor([sequences[index]]))[0] for index in members])

    ways: dict[str, tuple[Callable[[list[int]], torch.Tensor], list[list[int]]]] = {
        "padded": (flat_padded, padded),
        "dense": (dense, packs),
        "loop": (loop, packs),
        "packed": (lambda members: packed_hidden(view, pack([sequences[index] for index in members])), packs),
    }
    ways = {name: ways[name] for name in args.ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    norms: dict[str, float] = {}
    for number in range(args.rounds + 1):
        for name, (forward, batches) in ways.items():
            if name == "packed":
                assert packs_exactly(view)
            model.zero_grad(set_to_none=True)
            began = time.process_time()
            for members in batches:
                forward(members).square().sum().backward()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - began)
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            norms[name] = float(torch.nn.utils.get_total_norm(grads))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "packing",
                "shape": args.shape,
                "threads": args.threads,
                "tokens": sum(lengths),
                "max_tokens": budget,
                "micro_batches": {"padded": len(padded), "packed": len(packs)},
                "padding_share": round(padding_share(lengths, padded), 4),
                "cpu_s": {name: round(value, 4) for name, value in medians.items()},
                "ratio": round(medians["packed"] / medians["padded"], 3),
                "gradient_norms_agree_to": max(abs(value / norms["packed"] - 1.0) for value in norms.values()),
                "waste": waste_of_long_tails(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
