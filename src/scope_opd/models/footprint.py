"""What a model's forward and backward passes allocate, found by running them on tensors that have no data.

The real modelling code, the real head (``models.head``) and torch's real autograd run under ``FakeTensorMode``: every
allocation is seen when it is made and when it is freed, and nothing is computed. A stack of equal layers makes every
moment's memory affine in the number of layers, so two shallow traces give any depth; the laws are tests.

Not covered: scratch memory inside kernels, an allocator's fragmentation, mixtures of experts (what they allocate
depends on data), attention that materialises scores ("eager"), ``objective.distill`` other than "sampled".
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from scope_opd.config import LoraConfig
from scope_opd.errors import ConfigError, ModelError
from scope_opd.models.adapters import add_adapters
from scope_opd.models.checkpointing import Setting, set_checkpointing
from scope_opd.models.head import HeadView, Tail, TokenScores, _tails, response_logprobs, score_hidden
from scope_opd.models.packed_attention import packed_attention
from scope_opd.models.packing import pack
from scope_opd.models.rows import Rows
from scope_opd.models.sharding import in_whole_blocks
from scope_opd.models.watch import Moments, Watch, decoder_layers

ATTENTION = "scope_footprint"
SHALLOW = (3, 4)
"""Depths that are traced. With three layers there is a topmost and a lowest one, and one between them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A causal LM in numbers.

    Attributes:
        parameters: all, each once (tied heads are one with the embedding); adapters are not among them.
        layer_parameters: of one decoder layer (the mean, where they differ).
        adapters: of low-rank adapters; where there are any, they alone are trained.
        muon_parameters: trained 2-D ones that are neither embedding nor head.
        block_parameters: trained ones whose states an 8-bit optimiser keeps in 8 bits.
        layers, hidden, vocabulary: of the decoder, of the head.
        heads: attention heads x head size, the width of the queries.
        kv_heads, kv_width: key-value heads; times head size.
        tied: whether embedding and head are one tensor.
    """

    parameters: int
    layer_parameters: int
    adapters: int
    muon_parameters: int
    block_parameters: int
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    kv_width: int
    tied: bool

    @property
    def root_parameters(self) -> int:
        """Those outside the layers: embedding, head, last norm."""
        return self.parameters - self.layers * self.layer_parameters

    @property
    def matrix_parameters(self) -> int:
        """Those that every token is multiplied by: all but an untied embedding."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)


def shape_of(config: Any, lora: LoraConfig | None = None, shards: int = 1) -> Shape:
    """Count a model's parameters exactly, on the meta device, from its Hugging Face config.

    Args:
        config: the model's.
        lora: its adapters.
        shards: ranks that each of its parameters is dealt to.

    Raises:
        ConfigError: adapters that it cannot have.
        ModelError: transformers cannot build it.
    """
    text = config.get_text_config()
    with _explained(config), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_prepared(config, None))
    layers = list(decoder_layers(model))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    outer = {id(embedding.weight)} | ({id(head.weight)} if head is not None else set())
    parameters = list(model.parameters())
    layer_parameters = sum(p.numel() for layer in layers for p in layer.parameters())
    with torch.device("meta"):
        add_adapters(model, lora or LoraConfig(), seed=None)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shape(
        parameters=sum(p.numel() for p in parameters),
        layer_parameters=layer_parameters // len(layers),
        adapters=sum(p.numel() for p in trained) if lora is not None and lora.rank else 0,
        muon_parameters=sum(p.numel() for p in trained if p.ndim == 2 and id(p) not in outer),
        block_parameters=sum(p.numel() for p in trained if in_whole_blocks(p.shape, shards)),
        layers=len(layers),
        hidden=int(text.hidden_size),
        vocabulary=int((embedding if head is None else head).weight.shape[0]),
        heads=text.num_attention_heads * size,
        kv_heads=kv_heads,
        kv_width=kv_heads * size,
        tied=head is not None and head.weight is embedding.weight,
    )


def update_moments(
    config: Any,
    tokens: int,
    *,
    rows: int = 1,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    checkpointing: Setting = "off",
    temperature: float = 1.0,
    extra_temperature: float | None = None,
    layers: int | None = None,
    lora: LoraConfig | None = None,
) -> Moments:
    """Bytes that one micro-batch's forward and backward pass hold beyond weights, gradients and optimiser states.

    Gradients are there already, as after a step's first micro-batch, so that those under way come on top of them.

    Args:
        config: the model's.
        tokens: prompt + response tokens of the micro-batch; all but a row's first are taken to be response.
        rows: of equal length.
        packed: one row of ``ragged`` sequences instead. A GPU's kernel for them copies no more than is counted here.
        dtype: of the weights.
        autocast: what matrices are multiplied in, if not in ``dtype``.
        checkpointing: ``train.activation_checkpointing``; of "offload" what is left on the device.
        temperature, extra_temperature: as for ``response_logprobs``.
        layers: depth; None is the config's. Deeper than ``SHALLOW`` is extrapolated.
        lora: adapters; only they have gradients then.

    Returns:
        By moment: "forward", "kept" (as the forward pass ends), "head" (forward and backward of the log-probs),
        "top layer", "lower layers", "lowest layer" and "embedding" of the backward pass; by part: "attention", "MLP",
        "norms", "residual stream", "embedding", "log-prob chunk", "cast weights", "backward".

    Raises:
        ModelError: the model cannot be traced.
    """

    def run(model: PreTrainedModel, watch: Watch) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        run_update(
            _TakenApart(model), watch, tokens, rows=rows, packed=packed, autocast=autocast, checkpointing=checkpointing,
            temperature=temperature, extra_temperature=extra_temperature,
        )  # fmt: skip

    return _any_depth(config, dtype, layers, run, checkpointing if isinstance(checkpointing, int) else 1, lora)


def run_update(
    view: HeadView,
    watch: Watch,
    tokens: int,
    *,
    rows: int = 1,
    packed: bool = False,
    autocast: torch.dtype | None = None,
    checkpointing: Setting = "off",
    temperature: float = 1.0,
    extra_temperature: float | None = None,
) -> None:
    """One micro-batch as the learner runs it, under ``watch``: of real tensors, or of such without data."""
    model = view.model
    set_checkpointing(model, checkpointing, keep=_elsewhere if checkpointing == "offload" else None)
    ids, positions = _rows(tokens, rows)
    wanted = ids[positions[:, 0], positions[:, 1]]
    lengths = ragged(tokens) if packed else (ids.shape[1],) * len(ids)
    together = Rows(ids, lengths, pack([[0] * length for length in lengths]) if packed else None)
    with watch:
        with _cast(autocast):
            hidden = together.response_hidden(view, positions)
            watch.note("kept")
            watch.moment = "head"
            scores = score_hidden(view, hidden, wanted, temperature, extra_temperature=extra_temperature)
        scores.logprobs.sum().backward()


def scoring_moments(
    config: Any,
    tokens: int,
    *,
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    head: bool = True,
    layers: int | None = None,
) -> Moments:
    """As ``update_moments`` without gradient: a teacher's or reference's pass, or (``head = False``) a prefill."""

    def run(model: PreTrainedModel, watch: Watch) -> None:
        ids, positions = _rows(tokens, rows)
        view = _TakenApart(model)
        with watch, torch.no_grad(), _cast(autocast):
            if head:
                watch.moment = "head"
                response_logprobs(view, ids, None, positions)
            else:
                view.hidden(ids)

    return _any_depth(config, dtype, layers, run)


def peak(moments: Mapping[str, Counter[str]]) -> tuple[str, Counter[str]]:
    """The moment that holds most, and its parts."""
    return max(moments.items(), key=lambda item: sum(item[1].values()))


def _any_depth(
    config: Any,
    dtype: torch.dtype,
    layers: int | None,
    run: Callable[[PreTrainedModel, Watch], None],
    period: int = 1,
    lora: LoraConfig | None = None,
) -> Moments:
    """Of any depth, where every ``period``-th layer is like another: the two depths traced are so far from it too."""
    depth = layers or int(config.get_text_config().num_hidden_layers)
    few = SHALLOW[0] + (depth - SHALLOW[0]) % period
    more = few + (SHALLOW[1] - SHALLOW[0]) * period
    if depth <= more:
        return _trace(config, dtype, depth, run, lora)
    low, high = _trace(config, dtype, few, run, lora), _trace(config, dtype, more, run, lora)
    found: Moments = {}
    for moment, at_more in high.items():
        at_few = low[moment]
        found[moment] = Counter(
            {
                part: size + (depth - more) * (size - at_few.get(part, 0)) // (more - few)
                for part, size in at_more.items()
            }
        )
    return found


def _trace(
    config: Any,
    dtype: torch.dtype,
    depth: int,
    run: Callable[[PreTrainedModel, Watch], None],
    lora: LoraConfig | None,
) -> Moments:
    AttentionInterface.register(ATTENTION, _attention)
    adapted = None
    if lora is not None and lora.rank:  # peft cannot move tensors without data, but needs none
        with _explained(config), torch.device("meta"):
            adapted = AutoModelForCausalLM.from_config(_prepared(config, depth), dtype=dtype).eval()
            add_adapters(adapted, lora, seed=None)
    with _explained(config), FakeTensorMode(), _quiet_about_checkpointing():
        if adapted is not None:
            model = _on_device(adapted)
        else:
            model = AutoModelForCausalLM.from_config(_prepared(config, depth), dtype=dtype).eval()
        watch = Watch(model)
        try:
            run(model, watch)
        finally:
            watch.detach()
    return watch.moments


def _on_device(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the meta device with tensors of this device in their place."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    trained = old.requires_grad
                    made[id(old)] = nn.Parameter(new, requires_grad=trained) if isinstance(old, nn.Parameter) else new
                held[name] = made[id(old)]
    return model


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
    """Fused attention without a mask, what training does with right padding or packed rows."""
    return packed_attention(module, query, key, value, None, **more)


def ragged(tokens: int) -> tuple[int, ...]:
    """Lengths of four sequences of so many tokens together, for which attention over a pack copies about the most.

    They differ by a quarter, so that short ones go through attention together, with padding (``packed_attention``).
    """
    if tokens < 8:
        return (tokens,)
    long, short = -(-2 * tokens // 7), 3 * tokens // 14
    return (long, tokens - long - 2 * short, short, short)


def _rows(tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    length = max(tokens // rows, 2)
    columns = torch.arange(1, length).repeat(rows)
    positions = torch.stack((torch.arange(rows).repeat_interleave(length - 1), columns), dim=1)
    return torch.zeros(rows, length, dtype=torch.long), positions


def _prepared(config: Any, depth: int | None) -> Any:
    """A copy of the config that can be traced, cut to ``depth`` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if depth is not None:
        config._attn_implementation = ATTENTION
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types)[:depth]
    return config


@contextlib.contextmanager
def _explained(config: Any) -> Iterator[None]:
    try:
        yield
    except (ModelError, ConfigError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(
            f"model type {config.model_type!r} cannot be planned ({reason})",
            "a dense decoder that transformers can build",
            "measure a step on the machine instead",
        ) from error


@contextlib.contextmanager
def _quiet_about_checkpointing() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _elsewhere(hidden: Tensor) -> AbstractContextManager[Any]:
    """A layer's input is off the device from the end of the forward pass until the layer is computed again."""
    return saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.dtype), lambda saved: torch.empty(saved[0], dtype=saved[1])
    )


def _cast(dtype: torch.dtype | None) -> Any:
    """Autocast as on a GPU; that of the CPU casts the same operations of a decoder."""
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


class _TakenApart(HeadView):
    """A head view that takes the config's word for what follows the head: without data nothing can be compared."""

    def _find_tail(self) -> Tail | None:
        return next(_tails(self.model.config.get_text_config()))

    def fused(self, hidden: Tensor, targets: Tensor, temperature: float, **options: Any) -> TokenScores:
        return super().fused(hidden, targets, temperature, dry=True, **options)


def forward_flops(shape: Shape, length: int) -> float:
    """FLOPs of a forward pass over one sequence: 2 a weight and token, and causal attention, 2 x layers x width x
    length^2."""
    return 2.0 * shape.matrix_parameters * length + 2.0 * shape.layers * shape.heads * length**2
