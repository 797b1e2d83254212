"""The servers of a planned run: what one of their GPUs holds, and how many sequences its cache has room for.

Not covered: speed, servers of which nothing is configured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scope_opd.config import Config, ServerFlags

if TYPE_CHECKING:
    from scope_opd.cli.plan import Machine, Plan
    from scope_opd.models.memory import Server, Student

VLLM_UTILISATION = 0.92
"""vLLM's own default."""
VLLM_CHUNK = 8192
"""Tokens of a prefill chunk where none is set: the most that vLLM chooses for an API server below 160 GB."""


def plan_servers(config: Config, machine: Machine, found: Plan, student: Student, teacher: Any) -> None:
    """Add what samplers and teacher servers need to ``found``, and what they lack to its lines."""
    from scope_opd.cli.plan import gb
    from scope_opd.serving.launch import chunk_tokens

    rollouts = config.train.prompts_per_step * config.rollout.n
    if config.rollout.served:
        count = len(config.rollout.base_urls)
        flags = config.serving.student
        wanted = min(config.rollout.max_concurrency, -(-rollouts // count))
        server = _server(config, machine, flags, "student", student.config, VLLM_CHUNK, wanted)
        found.servers["sampler"] = (count, flags.tensor_parallel_size, server)
        if config.rollout.colocated:
            _colocated(config, machine, found, student, server)
            if (wants := count * flags.tensor_parallel_size) > machine.ranks:
                found.failures.append(
                    f"rollout.colocated: sampler servers on {wants} GPUs and {machine.ranks} that train (--gpus); "
                    "name fewer in rollout.base_urls, or train on as many"
                )
        if config.rollout.sync == "ipc" and machine.ranks > 1:
            found.failures.append(
                f"rollout.sync = 'ipc' with {machine.ranks} ranks: it reaches only a server on the GPU of rank 0; "
                "use 'files' or 'gloo'"
            )
    if teacher is not None and config.teacher.served:
        urls = {*config.teacher.base_urls} | {
            url for route in config.teacher.routes.values() for url in route.base_urls
        }
        flags = config.serving.teacher
        wanted = min(config.teacher.max_concurrency, -(-rollouts // len(urls)))
        chunk = chunk_tokens(found.shapes["teacher"].vocabulary, flags.max_num_seqs)
        server = _server(config, machine, flags, "teacher", teacher, chunk, wanted)
        found.servers["teacher"] = (len(urls), flags.tensor_parallel_size, server)
    for name, (_, _, server) in found.servers.items():
        if server.sequences < 1:
            found.failures.append(
                f"the {name} server has {gb(max(server.room, 0))} for its cache and one sequence needs "
                f"{gb(server.sequence)}; raise serving's tensor_parallel_size or gpu_memory_utilization"
            )
        elif server.sequences < server.wanted:
            found.warnings.append(
                f"the {name} server holds {server.sequences} sequences of full length and is asked for up to "
                f"{server.wanted}: if all grow that long, some wait"
            )
        beyond = machine.memory - server.budget - machine.reserve
        if server.outside > beyond:
            found.warnings.append(
                f"prompt log-probs of the {name} server take {gb(server.outside)} that vLLM does not reserve, and "
                f"{gb(max(beyond, 0))} are left beside its budget: lower its utilisation or max_num_batched_tokens"
            )


def _server(
    config: Config, machine: Machine, flags: ServerFlags, kind: str, model: Any, chunk: int, wanted: int
) -> Server:
    import torch

    from scope_opd.models.footprint import shape_of
    from scope_opd.models.loading import context_length
    from scope_opd.models.memory import server
    from scope_opd.serving.launch import context_needed

    context = flags.max_model_len or context_needed(config, "student" if kind == "student" else "teacher")
    context = min(context, context_length(model) or context)
    named = flags.dtype if flags.dtype != "auto" else getattr(model, "dtype", None) or "bfloat16"
    return server(
        shape_of(model),
        model,
        named if isinstance(named, torch.dtype) else getattr(torch, named),
        budget=int((flags.gpu_memory_utilization or VLLM_UTILISATION) * machine.memory),
        tensor_parallel=flags.tensor_parallel_size,
        context=context,
        chunk=flags.max_num_batched_tokens or chunk,
        wanted=min(flags.max_num_seqs or wanted, wanted),
        prompt_logprobs=kind == "teacher",
    )


def _colocated(config: Config, machine: Machine, found: Plan, student: Student, server: Server) -> None:
    """While servers on the trainer's GPU are awake, the trainer keeps weights and optimiser states there."""
    from scope_opd.models.memory import Stage, resident

    parts = resident(student, machine.layout(config), {}) | {"sampler server's budget": server.budget}
    found.stages.insert(0, Stage("generation", parts, "decoding"))
