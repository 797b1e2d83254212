"""``scope plan``: whether a run fits its GPUs, by part and rank, before anything is downloaded or started.

Not covered: speed, apart from FLOPs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from scope_opd.errors import ConfigError
from scope_opd.words import counted

if TYPE_CHECKING:
    from scope_opd.cli.plan import Machine, Plan
    from scope_opd.config import Config

EXAMPLES = """Examples:
  scope plan my.toml --gpu-memory 80
  scope plan my.toml --gpus 8 --gpu-memory 80 --json
  scope plan configs/paper/deepseek_r1_distill_qwen_1_5b.toml --gpus 16
"""

RESERVE_GB = 2.0
UTILISATION = 0.2
PATIENCE_S = 3.0
"""Seconds after which a plan that is still being made says so."""


def plan(
    config: Path,
    /,
    *,
    gpus: int | None = None,
    gpu_memory: float = 80.0,
    machine_gpus: int = 8,
    reserve: float = RESERVE_GB,
    mean_response: int | None = None,
    tflops: float | None = None,
    utilisation: float = UTILISATION,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    overrides: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
) -> int:
    """Plan the memory of a run and the cost of a step.

    Nothing is loaded or computed: of each model only its config.json is
    needed. The student's own code runs once on tensors without data, so that
    what its passes allocate is counted, not guessed. Exit code 1 if the run
    does not fit.

    Parameters
    ----------
    config
        The TOML file of a run.
    gpus
        GPUs that train, in place of launch.trainer (1 where nothing says how many).
        Servers have their own, unless rollout.colocated.
    gpu_memory
        Memory of one GPU, in GB (1e9 bytes).
    machine_gpus
        GPUs that train on one machine; train.shard = "hybrid" needs to know.
    reserve
        GB that hold no tensor: CUDA context, workspaces, NCCL, slack. An allowance.
    mean_response
        Tokens of a response, for the cost of a step; without it all are as
        long as they may be.
    tflops
        Peak TFLOP/s of a GPU (A100 312, H100 989): shows hours for a step.
    utilisation
        Share of that peak which training reaches.
    as_json
        Print one JSON object instead of tables.
    overrides
        TABLE.KEY=VALUE in place of what the file says; may be repeated.
    """
    from scope_opd.cli.launch_asks import planned

    for option, value, right, expected in (
        ("--gpus", gpus, gpus is None or gpus >= 1, "a number from 1"),
        ("--machine-gpus", machine_gpus, machine_gpus >= 1, "a number from 1"),
        ("--gpu-memory", gpu_memory, 0 < gpu_memory < 1e5, "GB above 0"),
        ("--reserve", reserve, 0 <= reserve < gpu_memory, f"GB from 0, and less than --gpu-memory {gpu_memory:g}"),
        ("--mean-response", mean_response, mean_response is None or mean_response >= 1, "a number from 1"),
        ("--tflops", tflops, tflops is None or 0 < tflops < 1e6, "TFLOP/s above 0"),
        ("--utilisation", utilisation, 0 < utilisation <= 1, "a share above 0, up to 1"),
    ):
        if not right:
            raise ConfigError(f"{option} {value}", expected, f"change {option}")
    settings, ranks, lines = planned(config, overrides or [], gpus)
    from scope_opd.cli.plan import Machine
    from scope_opd.cli.plan import plan as find

    machine = Machine(ranks, int(gpu_memory * 1e9), int(reserve * 1e9), machine_gpus)
    with _patience():
        found = find(settings, machine, mean_response=mean_response)
    found.warnings[:0] = lines
    figures = as_figures(settings, machine, found)
    if tflops is not None:
        from scope_opd.cli.plan import hours

        figures["hours_a_step"] = hours(found, ranks, tflops, utilisation)
        figures["hours_assume"] = {"peak_tflops": tflops, "utilisation": utilisation}
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        _show(str(config), machine, found, figures)
    return 1 if found.failures else 0


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """A line on stderr if what is within takes a while."""
    line = "planning: the student's passes are run on tensors without data; large models may take half a minute"
    timer = threading.Timer(PATIENCE_S, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def as_figures(config: Config, machine: Machine, found: Plan) -> dict[str, Any]:
    """Everything as plain values: bytes, tokens, FLOPs."""
    servers = {
        name: {
            "servers": count,
            "gpus_each": each,
            "parts": server.parts,
            "budget": server.budget,
            "cache_room": server.room,
            "cache_of_one_sequence": server.sequence,
            "sequences_of_full_length": server.sequences,
            "sequences_wanted": server.wanted,
            "prompt_logprobs_outside_budget": server.outside,
        }
        for name, (count, each, server) in found.servers.items()
    }
    colocated = {"sampler"} if config.rollout.colocated else set()
    extra = sum(count * each for name, (count, each, _) in found.servers.items() if name not in colocated)
    return {
        "fits": not found.failures,
        "ranks": machine.ranks,
        "gpus": machine.ranks + extra,
        "gpu_memory": machine.memory,
        "reserve": machine.reserve,
        "layout": _layout(config, machine),
        "models": {
            name: {"parameters": shape.parameters, "layers": shape.layers, "vocabulary": shape.vocabulary}
            for name, shape in found.shapes.items()
        },
        "stages": {
            stage.name: {"total": stage.total, "at": stage.moment, "parts": stage.parts} for stage in found.stages
        },
        "rank_total": found.largest.total + machine.reserve,
        "servers": servers,
        "microbatch_tokens": found.microbatch,
        "largest_microbatch_tokens": found.largest_microbatch,
        "largest_response_tokens": found.largest_response,
        "response_bound_by": found.bound,
        "step_tokens": found.tokens,
        "step_flops": found.flops,
        "failures": found.failures,
        "warnings": found.warnings,
    }


def _layout(config: Config, machine: Machine) -> str:
    if machine.ranks == 1:
        return "one rank"
    shards = machine.layout(config).shards
    if shards == machine.ranks:
        return f"{machine.ranks} ranks, weights, gradients and optimiser states dealt to all of them"
    return f"{machine.ranks} ranks, weights, gradients and optimiser states dealt to the {shards} of each machine"


def _show(name: str, machine: Machine, found: Plan, figures: dict[str, Any]) -> None:
    from scope_opd.cli.plan import gb
    from scope_opd.cli.show import show_table

    models = ", ".join(f"{who} {_millions(shape.parameters)} parameters" for who, shape in found.shapes.items())
    print(f"{name}: {models}; {figures['layout']}; {counted(figures['gpus'], 'GPU')} of {gb(machine.memory)} in all")
    if machine.ranks > 1:
        print("the plan of several ranks has been compared with two on a CPU, not with GPUs (benchmarks/results.md)")
    unit, name_of = (1e9, "GB") if found.largest.total >= 1e9 else (1e6, "MB")
    cell = partial(_cell, unit=unit)
    parts = list(dict.fromkeys(part for stage in found.stages for part in stage.parts))
    rows = [[part, *(cell(stage.parts.get(part)) for stage in found.stages)] for part in parts]
    rows.append(["reserve", *(cell(machine.reserve) for _ in found.stages)])
    rows.append(["total", *(cell(stage.total + machine.reserve) for stage in found.stages)])
    rows.append(["at", *(stage.moment for stage in found.stages)])
    print()
    show_table([f"{name_of} a rank", *(stage.name for stage in found.stages)], rows)
    if found.servers:
        header = [f"{name_of} a server's GPU", *found.servers]
        kept = [server for _, _, server in found.servers.values()]
        print()
        show_table(header, [
            ["servers x GPUs", *(f"{count} x {each}" for count, each, _ in found.servers.values())],
            *([part, *(cell(server.parts[part]) for server in kept)] for part in kept[0].parts),
            ["room for the cache", *(cell(max(server.room, 0)) for server in kept)],
            ["vLLM's budget", *(cell(server.budget) for server in kept)],
            ["prompt log-probs, outside it", *(cell(server.outside) for server in kept)],
            ["sequences of full length", *(f"{server.sequences} of {server.wanted}" for server in kept)],
        ])  # fmt: skip
    tokens, flops = found.tokens, found.flops
    print()
    print(f"micro-batch: {found.microbatch} tokens planned, {found.largest_microbatch} would fit")
    print(f"longest response that would fit: {found.largest_response} tokens, bound by {found.bound}")
    scored = f", {tokens['scored']:,} scored" if tokens["scored"] else ""
    print(f"a step, at most: {tokens['generated']:,} tokens generated{scored}, {tokens['trained']:,} trained")
    print("its PFLOPs: " + ", ".join(f"{name} {size / 1e15:,.1f}" for name, size in flops.items() if size))
    if "hours_a_step" in figures:
        assumed, spent = figures["hours_assume"], figures["hours_a_step"]
        print(
            f"hours a step at {assumed['utilisation']:.0%} of {assumed['peak_tflops']:g} TFLOP/s: "
            + ", ".join(f"{stage} {size:.2f}" for stage, size in spent.items())
            + " (generation is bound by memory and not estimated)"
        )
    for line in found.warnings:
        print(f"warning: {line}")
    for line in found.failures:
        print(f"does not fit: {line}")
    if not found.failures:
        print(f"fits: {gb(figures['rank_total'])} of {gb(machine.memory)} a rank, the most in {found.largest.name}")


def _cell(size: int | None, unit: float) -> str:
    return "" if not size else f"{size / unit:.2f}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.3f}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"
