"""Where a SCOPE step's time goes: torch.profiler over one step, by stage and operator, on a CPU or a GPU.

    python benchmarks/profile_step.py                                    # the zoo's student, one thread
    python benchmarks/profile_step.py --shape real --threads 2           # hidden 512, 8 layers, 151,936 ids
    python benchmarks/profile_step.py --shape real --device cuda --trace step.json

The steps are those of against_trl.py (shapes, prescribed lengths: benchmarks/workload.py), on the engines and the
learner of ``scope train``. Stages: ``generation`` (the sampler), ``teacher``, ``credit and batch``, ``forward``,
``backward``, ``optimiser`` (clipping included). Two steps warm up, one is timed without the profiler, one is profiled;
the profiler slows small operators down, so shares are read from it and seconds from the timed step. ``outside
operators`` is time of a stage in which none of torch's operators ran on the CPU: Python, and waiting for a GPU.

Prints a table on stderr and one JSON line. ``--trace`` writes a file for chrome://tracing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workload import BETAS, EPS, LR, SHAPES, TEMPERATURE, WEIGHT_DECAY, Shape, correct, make_models, prescribe, shape_of

PREFIX = "stage: "


class Stages:
    """Marks stretches of a step, nested ones on their own account, and adds up their wall time."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        import torch

        began = self._now()
        try:
            with torch.profiler.record_function(PREFIX + name):
                yield
                self._now()
        finally:
            self.seconds[name] += self._now() - began

    def around(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return inner(*args, **kwargs)

        setattr(owner, method, wrapped)

    def _now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def step_maker(args: argparse.Namespace, shape: Shape, folder: Path) -> tuple[Any, Stages]:
    """A function (step number) that does a SCOPE step, and its stages."""
    import torch

    from scope_opd.cli.engines import build_engines
    from scope_opd.config import validate_config
    from scope_opd.rollout import local
    from scope_opd.train.early import Gathering
    from scope_opd.train.step import Learner
    from scope_opd.types import Verdict

    class Coin:
        async def verify(self, rollout: Any, prompt: Any) -> Verdict:
            return Verdict(correct=correct(rollout.sample), reward=float(correct(rollout.sample)), reason="a coin")

    wanted: dict[tuple[str, int], int] = {}
    stages = Stages(torch.device(args.device))

    class Prescribed(local._DecodeBatch):
        def advance(self) -> Any:
            with stages.stage("generation"):
                return super().advance()

        def _draw(self, logits: torch.Tensor) -> torch.Tensor:
            lengths = [wanted[prompt.id, sample] for prompt, sample in self.rows]
            return super()._draw(prescribe(logits, self.t, lengths, self.params.stop_token_ids))

    local._DecodeBatch = Prescribed  # type: ignore[misc]
    student, teacher = make_models(shape, folder)
    train: dict[str, Any] = {
        "steps": 4, "prompts_per_step": shape.prompts, "lr": LR, "betas": list(BETAS), "eps": EPS,
        "weight_decay": WEIGHT_DECAY, "max_tokens_per_microbatch": args.tokens, "device": args.device,
    }  # fmt: skip
    if args.threads:
        train["threads"] = args.threads
    config = validate_config(
        {
            "model": {"path": student},
            "teacher": {"path": teacher, "max_tokens_per_batch": args.tokens},
            "data": {"train": "zoo", "verifier": "zoo", "shuffle": False},
            "rollout": {"n": shape.samples, "temperature": TEMPERATURE, "max_tokens": shape.high},
            "objective": {"method": args.method},
            "train": train,
        }
    )
    built = build_engines(config)
    engines = built.engines
    engines.pipeline.verifier = Coin()  # type: ignore[attr-defined]
    if built.teacher is not None:
        stages.around(built.teacher, "_score_batch", "teacher")
    learner = Learner(engines, config.train)
    stages.around(learner.forward, "run", "forward")
    stages.around(learner.optimizer, "step", "optimiser")
    stages.around(learner, "_clip_gradient", "optimiser")
    backward = torch.Tensor.backward

    def timed_backward(self: torch.Tensor, *more: Any, **options: Any) -> None:
        with stages.stage("backward"):
            backward(self, *more, **options)

    torch.Tensor.backward = timed_backward  # type: ignore[method-assign]

    def one(number: int) -> dict[str, Any]:
        prompts = engines.schedule.batch(number)
        order = [(prompt.id, sample) for prompt in prompts for sample in range(shape.samples)]
        wanted.clear()
        wanted.update(zip(order, shape.lengths(warm=number == 0), strict=True))
        gathering = Gathering(engines, learner, config.train, prompts)
        collected = engines.pipeline.collect(prompts, engines.sampling, step=number, policy_version=number)
        with stages.stage("credit and batch"):
            _, batch = gathering.complete(collected.rollouts)
        outcome = learner.update(batch, LR, begun=gathering.begun)
        assert outcome.updates == 1
        return {"tokens": sum(len(rollout.token_ids) for rollout in collected.rollouts), "trained": batch.tokens}

    return one, stages


def table(events: Any, device: str) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Self time by stage and operator, and the length of each stage, in microseconds.

    An operator belongs to the innermost stage in which it began; kernels of a GPU to the stage in which they ran, which
    is their own because stages end with a wait for the device.
    """
    spans = sorted(
        ((event.time_range.start, event.time_range.end, event.name[len(PREFIX) :]) for event in events
         if event.name.startswith(PREFIX) and event.device_type.name == "CPU"),
        key=lambda span: span[1] - span[0],
    )  # fmt: skip
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    lengths: dict[str, float] = defaultdict(float)
    for start, end, name in spans:
        lengths[name] += end - start
    edges = sorted(spans)
    for event in events:
        on_gpu = event.device_type.name != "CPU"
        if event.name.startswith(PREFIX) or (device == "cuda") != on_gpu:
            continue
        stage = _stage_at(edges, event.time_range.start)
        own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        found[stage][event.name] += own
    return found, lengths


def _stage_at(spans: list[tuple[float, float, str]], moment: float) -> str:
    """Stages do not nest but in one another's time (none does today), so the last that began decides."""
    import bisect

    place = bisect.bisect_right(spans, (moment, float("inf"), "")) - 1
    return spans[place][2] if place >= 0 and moment <= spans[place][1] else "between stages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="zoo")
    parser.add_argument("--scale", type=float, default=1.0, help="of the response lengths")
    parser.add_argument("--method", default="scope")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--top", type=int, default=12, help="operators a stage")
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    import torch
    from torch.profiler import ProfilerActivity, profile

    shape = shape_of(args.shape, args.scale)
    with tempfile.TemporaryDirectory() as folder:
        step, stages = step_maker(args, shape, Path(folder))
        step(0)
        if args.shape != "real":
            step(1)
        stages.seconds.clear()
        began = time.perf_counter()
        work = step(2)
        whole, seconds = time.perf_counter() - began, dict(stages.seconds)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == "cuda" else [])]
        with profile(activities=activities) as seen:
            step(3)
    found, lengths = table(seen.events(), args.device)
    if args.trace:
        seen.export_chrome_trace(str(args.trace))
    report: dict[str, Any] = {}
    for name in [*seconds, "between stages"]:
        operators = sorted(found[name].items(), key=lambda item: -item[1])
        inside = sum(value for _, value in operators)
        total = lengths.get(name, inside) or 1.0
        report[name] = {
            "seconds": round(seconds.get(name, whole - sum(seconds.values())), 4),
            "share": round(seconds.get(name, whole - sum(seconds.values())) / whole, 3),
            "outside_operators": round(max(0.0, 1 - inside / total), 3) if name in lengths else None,
            "operators": {key: round(value / total, 3) for key, value in operators[: args.top]},
        }
        print(f"\n{name}: {report[name]['seconds']} s, {report[name]['share']:.0%}", file=sys.stderr)
        print(f"    outside operators: {report[name]['outside_operators']}", file=sys.stderr)
        for key, share in report[name]["operators"].items():
            print(f"    {share:6.1%}  {key}", file=sys.stderr)
    print(
        json.dumps(
            {
                "benchmark": "profile_step", "shape": args.shape, "method": args.method, "device": args.device,
                "threads": torch.get_num_threads(), "step_s": round(whole, 4), "work": work, "stages": report,
                "torch": torch.__version__,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
