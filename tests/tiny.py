"""Tiny real models and a tiny real tokenizer, made on the spot, for every test that needs an engine.

``tiny_model`` builds random Hugging Face causal LMs of several architectures whose next-token distributions are far
from uniform; ``tiny_tokenizer`` trains a byte-level BPE with a chat template; ``save_pair`` writes both as a folder
that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load. Not covered: models that know anything.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD, EOS, END = "<pad>", "<eos>", "<end>"
PAD_ID, EOS_ID, END_ID = 0, 1, 2
VOCABULARY_SIZE = 320

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- message['role'] + ': ' + message['content'] + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)

_CORPUS = [
    "What is 3 + 4? The answer is \\boxed{7}.",
    "user: add the numbers 12 and 30, then say the total.",
    "assistant: first 12 plus 30 makes 42, so the answer is \\boxed{42}.",
    "system: you are a careful student of arithmetic.",
    "The sum of two numbers is the same in either order.",
    "Let x be the number of apples; then 2 x + 1 = 9 and x = 4.",
]

# kind -> (config class, model class, what differs from the common sizes)
_ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 8, "num_key_value_heads": 2}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False, "num_key_value_heads": 2}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "head_dim": 8,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 20.0,
        },
    ),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"tie_word_embeddings": False}),
    "cohere": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25, "num_key_value_heads": 2}),
    "granite": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 3.0, "num_key_value_heads": 2}),
}

KINDS = ("qwen3", "llama", "gemma2", "gpt_neox")


def tiny_model(
    kind: str = "qwen3",
    *,
    seed: int = 0,
    vocab_size: int = VOCABULARY_SIZE,
    hidden_size: int = 32,
    layers: int = 2,
    context: int = 256,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> PreTrainedModel:
    """A random causal LM in eval mode, the same for the same arguments.

    Args:
        kind: "qwen3" (tied), "llama" (untied), "gemma2" (soft-caps, a sliding window of 8), "gpt_neox", "cohere"
            (logit scale), "granite" (logits scaling).
        seed: of the weights.
        config: further fields of the architecture's config.
    """
    config_class, model_class, own = _ARCHITECTURES[kind]
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "initializer_range": 0.25,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": None,
        **own,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**values))
    return model.to(dtype).eval()


@functools.cache
def _backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, EOS, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens: any text goes through it unchanged; ``<pad>`` 0, ``<eos>`` 1, ``<end>`` 2."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[END],
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_pair(path: str | Path, kind: str = "qwen3", **options: Any) -> Path:
    """Write a tiny model and the tiny tokenizer as one Hugging Face folder; ``options`` go to ``tiny_model``."""
    folder = Path(path)
    tiny_model(kind, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
