"""Log-probs of tokens with gradient: objective.chunked against full logits, in time and in memory.

    python benchmarks/logprobs.py --tokens 4096 --ways naive chunked --rounds 1      # CPU, float32: about four minutes
    python benchmarks/logprobs.py --tokens 16384 --ways chunked --rounds 1 --passes 1    # naive does not fit; five
    python benchmarks/logprobs.py --tokens 1024 --ways chunked --rounds 1 --tiles        # sides of a tile; five
    python benchmarks/logprobs.py --device cuda      # bfloat16; also the kernels of Liger and cut-cross-entropy

Hidden size 1,536 and 151,936 ids (Qwen2.5-1.5B) unless told otherwise. ``naive`` is (h W^T).log_softmax().gather();
every way computes the log-probs of given tokens and the gradients of hidden states and matrix, under a loss that is
not linear in the log-probs (a clipped ratio). ``chunked`` gives the entropy besides; ``chunked, no entropy`` does what
naive does; ``chunked, frozen head`` needs no gradient of the matrix. Fused cross-entropy kernels give a loss a token,
which is the same number; they run where they can be imported, for their time and memory.

Minutes are for two quiet cores; naive at 4,096 tokens takes about 10 GB. Without options all ways run at both sizes,
for three rounds: an hour. Each figure comes from a process of its own, ways in turn, medians over ``--rounds``. Memory
is the peak above the inputs, the gradients of both counted: on a CPU that of the resident set (the kernel's own
high-water mark, reset once the inputs are there), on a GPU of what torch has allocated. Time is the second of two
passes (``--passes 1``: the only one), and wall time (``--cpu-time``: of the process, for busy machines). Prints a table
on stderr and one JSON line; ``ratios`` are chunked / naive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

WAYS = ("naive", "chunked", "chunked, no entropy", "chunked, frozen head")
KERNELS = ("liger", "cut_cross_entropy")
TILES = ((256, 151_936), (256, 8192), (1024, 2048), (1024, 8192), (1024, 32_768), (4096, 2048), (4096, 8192))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16_384])
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, choices=[1, 2], default=2)
    parser.add_argument("--ways", nargs="+", help=f"of {', '.join((*WAYS, *KERNELS))}")
    parser.add_argument("--tiles", action="store_true", help="a table over sides of a tile, at the first --tokens")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--limit-gb", type=float, default=16.0, help="naive is left out where it would need more")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, **json.loads(args.one))))
        return
    ways = args.ways or [*WAYS, *(KERNELS if args.device == "cuda" else ())]
    report: dict[str, Any] = {"benchmark": "logprobs", "hidden": args.hidden, "vocabulary": args.vocabulary}
    report |= {"device": args.device, "threads": args.threads, "clock": "cpu" if args.cpu_time else "wall"}
    for tokens in args.tokens:
        # Logits, their log-softmax, the gradients of both: three of them at least are there at once.
        fits = 3 * 4e-9 * tokens * args.vocabulary <= args.limit_gb
        jobs = {way: {"way": way, "tokens": tokens} for way in ways if fits or way != "naive"}
        figures = rounds(args, jobs)
        report[str(tokens)] = figures
        naive = figures.get("naive", {})
        if "seconds" in naive:
            report[str(tokens)]["ratios"] = {
                way: {
                    "time": round(found["seconds"] / naive["seconds"], 3),
                    "memory": round(found["peak_gb"] / naive["peak_gb"], 4),
                }
                for way, found in figures.items()
                if way != "naive" and "seconds" in found
            }
    if args.tiles:
        tokens = args.tokens[0]
        report["tiles"] = rounds(
            args, {f"{t} x {v}": {"way": "chunked", "tokens": tokens, "tile": [t, v]} for t, v in TILES if t <= tokens}
        )
    report["versions"] = json.loads(child(args, {"way": "versions", "tokens": 0}))
    print(json.dumps(report))


def rounds(args: argparse.Namespace, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians of each job, the jobs in turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            if not any("missing" in one for one in found[name]):
                found[name].append(json.loads(child(args, job)))
    figures: dict[str, Any] = {}
    for name, ones in found.items():
        if any("missing" in one for one in ones):
            figures[name] = ones[0]
            continue
        figures[name] = {key: round(statistics.median(one[key] for one in ones), 4) for key in ones[0]}
        print(f"{jobs[name]['tokens']:6d} tokens  {name:22s} {figures[name]}", file=sys.stderr, flush=True)
    return figures


def child(args: argparse.Namespace, job: dict[str, Any]) -> str:
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    for name in ("hidden", "vocabulary", "device", "threads", "passes"):
        command += [f"--{name}", str(getattr(args, name))]
    if args.cpu_time:
        command.append("--cpu-time")
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


def measure(args: argparse.Namespace, way: str, tokens: int, tile: list[int] | None = None) -> dict[str, Any]:
    """One way, in this process: peak memory of the first pass, time of the second."""
    import torch

    if way == "versions":
        name = torch.cuda.get_device_name() if args.device == "cuda" else ""
        return {"torch": torch.__version__, "gpu": name}
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    hidden = torch.randn(tokens, args.hidden, device=device, dtype=dtype).requires_grad_()
    weight = torch.empty(args.vocabulary, args.hidden, device=device, dtype=dtype).normal_(std=0.04)
    weight.requires_grad_(way != "chunked, frozen head")
    targets = torch.randint(0, args.vocabulary, (tokens,), device=device)
    advantage = torch.randn(tokens, device=device)
    score = scorer(way, tile)
    if score is None:
        return {"missing": f"{way} cannot be imported"}

    def clock() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if args.cpu_time else time.perf_counter()

    def run() -> float:
        hidden.grad = weight.grad = None
        began = clock()
        logprobs = score(hidden, weight, targets)
        ratio = (logprobs - logprobs.detach()).exp()
        torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum().backward()
        return clock() - began

    warm = torch.randn(64, 64, device=device)  # the libraries' own threads and workspaces
    (warm @ warm).sum().item()
    before = reset_peak(args.device)
    seconds = run()
    peak = read_peak(args.device) - before
    if args.passes > 1:
        seconds = run()
    return {"seconds": seconds, "peak_gb": peak / 1e9, "gradients_gb": (weight.nbytes + hidden.nbytes) / 1e9}


def scorer(way: str, tile: list[int] | None) -> Callable[..., Any] | None:
    """hidden, weight, targets -> log-probs; None where a kernel cannot be imported."""
    import torch

    from scope_opd.objective.chunked import chunked_logprobs

    def naive(hidden: Any, weight: Any, targets: Any) -> Any:
        return (hidden @ weight.t()).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    def chunked(hidden: Any, weight: Any, targets: Any) -> Any:
        sides = {} if tile is None else {"tile_tokens": tile[0], "tile_vocabulary": tile[1]}
        return chunked_logprobs(hidden, weight, targets, entropy=way != "chunked, no entropy", **sides).logprobs

    try:
        if way == "liger":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
            return lambda hidden, weight, targets: -loss(weight, hidden, targets)
        if way == "cut_cross_entropy":
            from cut_cross_entropy import linear_cross_entropy

            return lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, reduction="none")
    except ImportError:
        return None
    if way == "naive":
        return naive
    assert way.startswith("chunked")
    assert torch.is_grad_enabled()
    return chunked


def reset_peak(device: str) -> int:
    """Bytes in use now, from which on the peak is counted."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def read_peak(device: str) -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else status("VmHWM")


def status(name: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
