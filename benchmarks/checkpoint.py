"""How long a save holds up training, in the foreground and behind it; prints one JSON line.

    python benchmarks/checkpoint.py [--folder DIR] [--saves N]

A Qwen3 of 107 million float32 parameters with AdamW's states (1.29 GB a checkpoint) on a CPU, one rank. "work" is a
forward and backward pass of 256 tokens, alone and while a checkpoint is being written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from scope_opd.config import TrainConfig
from scope_opd.ranks import Ranks
from scope_opd.train.checkpoint import Checkpoints
from scope_opd.train.optim import Optimizer
from scope_opd.train.shards import Shards, rng_state


def build() -> tuple[torch.nn.Module, Optimizer]:
    """The student, and its optimiser after a first step."""
    shape = Qwen3Config(
        vocab_size=32_000, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(shape)
    optimizer = Optimizer(model, TrainConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1e-4)
    optimizer.zero_grad()
    return model, optimizer


def main(folder: Path, saves: int) -> None:
    model, optimizer = build()
    store = Checkpoints(folder, Shards(Ranks(), model, optimizer), keep_last=1)
    ids = torch.randint(0, 32_000, (1, 256), generator=torch.Generator().manual_seed(0))

    def work() -> float:
        began = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        optimizer.zero_grad()
        return time.perf_counter() - began

    work()
    alone = [work() for _ in range(5)]
    foreground, held_up, whole, beside = [], [], [], []
    for number in range(saves):
        began = time.perf_counter()
        store.save(2 * number + 1, {}, rng_state())
        store.settle(wait=True)
        foreground.append(time.perf_counter() - began)
        began = time.perf_counter()
        store.save(2 * number + 2, {}, rng_state())
        held_up.append(time.perf_counter() - began)
        while store.settle(wait=False) is None:
            beside.append(work())
        whole.append(time.perf_counter() - began)
    size = sum(file.stat().st_size for file in next(folder.glob("step-*")).iterdir())
    began = time.perf_counter()
    found = store.newest_sound(print)
    checked = time.perf_counter()
    assert found is not None
    store.load(found)
    loaded = time.perf_counter()
    median = {
        "foreground_s": foreground, "background_blocks_s": held_up, "background_whole_s": whole,
        "work_alone_s": alone, "work_beside_s": beside,
    }  # fmt: skip
    print(json.dumps({
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "bytes": size, "saves": saves,
        **{name: round(statistics.median(values), 3) for name, values in median.items()},
        "ratio": round(statistics.median(held_up) / statistics.median(foreground), 4),
        "check_s": round(checked - began, 2), "load_s": round(loaded - checked, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; its file system is what is measured")
    parser.add_argument("--saves", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        main(Path(place) / "checkpoints", arguments.saves)
