"""Memory of a trainer's rank and of a server, part by part: sums of what ``footprint`` counts. Pure arithmetic.

A stage's memory is the sum of its parts; a rank needs that of its largest stage. Weights, gradients and optimiser
states are kept once a rank, or in equal shares (``Layout.shards``), in which case layers are gathered as they are
computed, and their gradients are whole until they are added up. The allowance for what no tensor holds (CUDA's context,
libraries' workspaces, an allocator's slack) is the caller's.

Not covered: tensor parallelism of the trainer; of offloaded states, the CPU's memory; what a step with 8-bit states
makes for the time being.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from scope_opd.config import LoraConfig
from scope_opd.models.checkpointing import Setting
from scope_opd.models.footprint import Moments, Shape, peak, scoring_moments, shape_of, update_moments
from scope_opd.models.head import KEPT_LOGITS

Parts = dict[str, int]

ADAPTER_BYTES = 4
"""Adapters are in float32."""
PROMPT_LOGPROB_BYTES = 6
"""A bfloat16 logit and its float32 log-prob, of each prompt token of a chunk at once."""
DRAW_BYTES = 12
"""What a float32 logit becomes as it is drawn from: divided by the temperature, its log-softmax, that exponentiated
(float32 each)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a trainer's state lies on its ranks.

    Attributes:
        world: ranks.
        shards: of them, those among which weights, gradients and optimiser states are dealt: all, or a machine's.
    """

    world: int = 1
    shards: int = 1

    def share(self, size: int) -> int:
        """What one rank keeps of ``size`` bytes."""
        return -(-size // self.shards)


@dataclass(frozen=True, slots=True)
class Student:
    """The model in training.

    Attributes:
        config, shape: its Hugging Face config and what ``shape_of`` makes of it.
        dtype: of its weights and, where they are trained themselves, of gradients and optimiser states.
        autocast: what it computes in, where that is another.
        optimizer: ``train.optimizer``.
        offload: ``train.offload``.
        lora: its adapters.
        checkpointing: ``train.activation_checkpointing``.
        packed: its micro-batches are packs.
        temperature, extra_temperature: of the log-probs.
    """

    config: Any
    shape: Shape
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    offload: Literal["off", "optimizer"] = "off"
    lora: LoraConfig | None = None
    checkpointing: Setting = "off"
    packed: bool = True
    temperature: float = 1.0
    extra_temperature: float | None = None

    @property
    def weights(self) -> int:
        """Bytes, adapters included."""
        return self.shape.parameters * self.dtype.itemsize + self.shape.adapters * ADAPTER_BYTES

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.shape.adapters or self.shape.parameters

    @property
    def trained_width(self) -> int:
        """Bytes of one of them; of its gradient, and of each of its states in full."""
        return ADAPTER_BYTES if self.shape.adapters else self.dtype.itemsize

    @property
    def gradients(self) -> int:
        """Bytes."""
        return self.trained * self.trained_width

    @property
    def states(self) -> int:
        """Bytes of optimiser states on the device: two moments a parameter, one for Muon's matrices."""
        if self.offload == "optimizer":
            return 0
        if self.optimizer == "adamw_8bit":
            blocks = self.shape.block_parameters
            return 2 * (self.trained - blocks) * self.trained_width + 2 * blocks + 2 * 4 * (blocks // 256)
        one = self.shape.muon_parameters if self.optimizer == "muon" else 0
        return (2 * self.trained - one) * self.trained_width

    def gathered(self, layout: Layout) -> int:
        """Bytes of whole weights that a rank holds beside its share: embedding and head throughout, two layers."""
        width = (self.autocast or self.dtype).itemsize
        whole = self.shape.root_parameters + 2 * self.shape.layer_parameters
        return whole * width if layout.shards > 1 else 0


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a step on one rank: bytes by part at its largest moment."""

    name: str
    parts: Parts
    moment: str = ""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def resident(student: Student, layout: Layout, frozen: Parts) -> Parts:
    """What a rank holds in every stage: weights, optimiser states, and ``frozen`` models.

    With several ranks also a plain copy in the dtype that the student computes in, which decodes or is published. Where
    servers sample only rank 0 has it; planned is the rank that needs most.
    """
    computes = (student.autocast or student.dtype).itemsize
    return {
        "weights": layout.share(student.weights),
        **({"plain copy": student.shape.parameters * computes} if layout.world > 1 else {}),
        "optimiser states": layout.share(student.states),
        **{name: size for name, size in frozen.items() if size},
    }


class Updates:
    """The update's memory by the tokens of a micro-batch; each size is traced once.

    Args:
        student, layout: what is trained, and where.
        frozen: other models' weights on the same device.
        reference: a frozen reference reads each micro-batch between its forward and backward pass.
    """

    def __init__(
        self, student: Student, layout: Layout, frozen: Parts | None = None, *, reference: bool = False
    ) -> None:
        self.student, self.layout, self.reference = student, layout, reference
        self.fixed = resident(student, layout, frozen or {}) | {"gradients": layout.share(student.gradients)}
        self._known: dict[int, Stage] = {}

    def stage(self, tokens: int) -> Stage:
        """With micro-batches of up to ``tokens`` in one row, all but the first of them in the loss."""
        return max((self.exactly(size) for size in dearest(self.student.shape, tokens)), key=lambda stage: stage.total)

    def exactly(self, tokens: int) -> Stage:
        """With micro-batches of just so many."""
        if tokens not in self._known:
            self._known[tokens] = self._stage(self._trace(tokens))
        return self._known[tokens]

    def _stage(self, moments: Moments) -> Stage:
        moments = {**moments, "optimiser": _optimiser_moment(self.student)}
        moment, parts = peak(_as_sharded(self.student, self.layout, moments))
        return Stage("update", self.fixed | {name: size for name, size in parts.items() if size}, moment)

    def _trace(self, tokens: int) -> Moments:
        student = self.student
        moments = update_moments(
            student.config, tokens, packed=student.packed, dtype=student.dtype, autocast=student.autocast,
            checkpointing=student.checkpointing, temperature=student.temperature,
            extra_temperature=student.extra_temperature, lora=student.lora,
        )  # fmt: skip
        if self.reference:
            _, theirs = peak(_scoring(student, tokens))
            moments["reference"] = Counter({**moments["kept"], "reference's pass": sum(theirs.values())})
        return moments


def dearest(shape: Shape, tokens: int) -> list[int]:
    """Sizes of a row of up to ``tokens``, one of which takes the most memory.

    Memory grows with every token but where logits are no longer kept whole (``KEPT_LOGITS``): a row that is just short
    enough for that may take more than one a little longer.
    """
    kept = 1 + max(KEPT_LOGITS // shape.vocabulary, 1)  # the row's first token is not predicted
    return [tokens] if tokens <= kept else [kept, tokens]


def prefill_bytes(student: Student, prompts: int, prompt_tokens: int) -> int:
    """What reading prompts together takes beside their cache."""
    _, reading = peak(_scoring(student, prompts * prompt_tokens, prompts, head=False))
    return sum(reading.values())


def generation_stage(
    student: Student,
    layout: Layout,
    *,
    rows: int,
    prompts: int,
    prompt_tokens: int,
    max_tokens: int,
    reading: int,
    frozen: Parts,
) -> Stage:
    """Sampling in process.

    Args:
        student, layout: what samples; with several ranks a plain copy does.
        rows: sequences decoded at once, all of full length.
        prompts: prompts among them, read together.
        prompt_tokens, max_tokens: lengths.
        reading: from ``prefill_bytes``.
        frozen: other models' weights on the same device.
    """
    shape, compute = student.shape, student.autocast or student.dtype
    # Rotary embeddings leave keys in the weights' dtype whatever autocast does, and values join a cache of that dtype.
    cache = cache_bytes(shape, student.dtype)
    length = prompt_tokens + max_tokens
    decoding = {
        "key-value cache": rows * length * cache,
        # A layer's keys grow by being copied.
        "growing the cache": rows * length * shape.kv_width * student.dtype.itemsize,
        "logits": rows * shape.vocabulary * (DRAW_BYTES + 4 + (compute.itemsize if compute.itemsize < 4 else 0)),
    }
    prefill = {
        "key-value cache": (prompts + rows) * prompt_tokens * cache,
        "reading the prompts": reading,
    }
    moment, parts = max((("decoding", decoding), ("prefill", prefill)), key=lambda found: sum(found[1].values()))
    if student.autocast is not None and layout.world == 1:
        parts["cast weights"] = shape.matrix_parameters * compute.itemsize
    return Stage("generation", resident(student, layout, frozen) | parts, moment)


def scoring_stage(
    student: Student, layout: Layout, teacher: Any, dtype: torch.dtype, tokens: int, frozen: Parts
) -> Stage:
    """An in-process teacher's pass over up to ``tokens``; its weights are among ``frozen``."""
    sizes = dearest(shape_of(teacher), tokens)
    found = (peak(scoring_moments(teacher, size, dtype=dtype)) for size in sizes)
    moment, parts = max(found, key=lambda at: sum(at[1].values()))
    return Stage("scoring", resident(student, layout, frozen) | {"teacher's pass": sum(parts.values())}, moment)


def largest(size: Callable[[int], int], room: int, ceiling: int, step: int = 128, start: int = 0) -> int:
    """The largest multiple of ``step`` up to ``ceiling`` whose ``size`` is at most ``room``; 0 where none is.

    ``size`` must never fall. It is called seldom, for it is nearly a straight line: the line through the bracket's ends
    says where to look, its neighbour whether that was the end. Where it bends, every other round takes the middle too.
    ``start``: where the bracket may begin, because its size is known already; of no consequence for what is found.
    """
    high = ceiling // step
    low = min(max(start // step, 1), high)
    at_low = size(low * step)
    if at_low > room and low > 1:
        low, high, at_low, at_high = 1, low, size(step), at_low
    else:
        at_high = size(high * step)
    if at_high <= room:
        return high * step
    if at_low > room:
        return 0
    straight = True
    while high - low > 1:
        on_line = low + int((room - at_low) / (at_high - at_low) * (high - low))
        straight = not straight
        for guess in (on_line, on_line + 1, *([(low + high) // 2] if straight else [])):
            if not low < guess < high:
                continue
            found = size(guess * step)
            if found <= room:
                low, at_low = guess, found
            else:
                high, at_high = guess, found
    return low * step


@dataclass(frozen=True, slots=True)
class Server:
    """A vLLM server on one of its GPUs.

    Attributes:
        parts: bytes by part, without the cache.
        budget: what vLLM may use for weights, passes and cache: its utilisation x the GPU's memory.
        outside: what it does not reserve: prompt log-probs of a chunk.
        sequence: cache of one sequence of full length.
        wanted: sequences under way at once.
    """

    parts: Parts
    budget: int
    outside: int
    sequence: int
    wanted: int

    @property
    def room(self) -> int:
        """Bytes left for the cache; negative where not even weights and passes fit."""
        return self.budget - sum(self.parts.values())

    @property
    def sequences(self) -> int:
        """Sequences of full length whose cache fits."""
        return max(self.room, 0) // self.sequence


def server(
    shape: Shape,
    config: Any,
    dtype: torch.dtype,
    *,
    budget: int,
    tensor_parallel: int,
    context: int,
    chunk: int,
    wanted: int,
    prompt_logprobs: bool,
) -> Server:
    """Memory of a vLLM server on one GPU.

    Args:
        shape, config, dtype: the served model.
        budget: bytes that it may use of one GPU.
        tensor_parallel: GPUs that share it.
        context: tokens of a sequence.
        chunk: tokens of a prefill chunk.
        wanted: sequences at once.
        prompt_logprobs: it scores: each chunk's logits in bfloat16 and log-probs in float32 exist at once.
    """
    _, reading = peak(scoring_moments(config, chunk, dtype=dtype, head=False))
    shards = min(tensor_parallel, shape.kv_heads)  # a head of keys and values is not cut
    return Server(
        parts={
            "weights": -(-shape.parameters * dtype.itemsize // tensor_parallel),
            "prefill chunk": -(-sum(reading.values()) // tensor_parallel),
        },
        budget=budget,
        outside=PROMPT_LOGPROB_BYTES * chunk * shape.vocabulary if prompt_logprobs else 0,
        sequence=context * cache_bytes(shape, dtype) // shards,
        wanted=wanted,
    )


def cache_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Keys and values of one token."""
    return 2 * shape.layers * shape.kv_width * dtype.itemsize


def _scoring(student: Student, tokens: int, rows: int = 1, head: bool = True) -> Moments:
    return scoring_moments(student.config, tokens, rows=rows, dtype=student.dtype, autocast=student.autocast, head=head)


def _optimiser_moment(student: Student) -> Counter[str]:
    """Temporary tensors of an optimiser step, one parameter after the other."""
    if student.optimizer == "muon":
        # The orthogonalisation of the largest matrix: update in the weights' dtype, four of its kind in bfloat16.
        matrix = max(student.shape.muon_parameters // max(student.shape.layers, 1) // 4, 1)
        return Counter({"optimiser step": matrix * (student.trained_width + 8)})
    return Counter({"optimiser step": 0})  # a fused kernel updates everything in place


def _as_sharded(student: Student, layout: Layout, moments: Moments) -> Moments:
    gathered = student.gathered(layout)
    if not gathered:
        return moments
    under_way = _gradients_under_way(student)
    found: Moments = {}
    for name, parts in moments.items():
        found[name] = Counter(parts)
        if name != "optimiser":
            found[name].pop("cast weights", None)  # what is gathered is cast already
            found[name]["gathered weights"] = gathered
            found[name]["gradients not yet dealt"] = under_way.get(name, 0)
    return found


def _gradients_under_way(student: Student) -> Counter[str]:
    """Whole gradients on a rank, by moment, beside those that the trace has.

    A unit's are there until its backward pass is over; then a copy in the dtype of the sum is added up over ranks, and
    lives until the next unit's is. The head's is the first to be there and, with the embedding's, the last to be dealt.
    """
    if student.shape.adapters:
        return Counter()  # a layer's adapters are small beside everything else
    computes, summed = (student.autocast or student.dtype).itemsize, student.dtype.itemsize
    shape, layer = student.shape, student.shape.layer_parameters
    root = shape.root_parameters
    head = root if shape.tied else root - shape.vocabulary * shape.hidden
    return Counter(
        {
            "head": head * computes,
            **dict.fromkeys(
                ("top layer", "lower layers", "lowest layer"), head * computes + layer * (computes + 2 * summed)
            ),
            "embedding": head * computes + (root + layer) * summed,
        }
    )
