"""Published shapes, so that a run can be planned before its models are downloaded. Numbers only, no weights.

Each is what matters of the model's config.json. A config that can be read comes first; these stand in for it.
"""

from __future__ import annotations

from typing import Any

_QWEN2 = {"model_type": "qwen2", "torch_dtype": "bfloat16", "max_position_embeddings": 131_072}
_QWEN3 = {"model_type": "qwen3", "torch_dtype": "bfloat16", "head_dim": 128, "vocab_size": 151_936}

SHAPES: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        **_QWEN2, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": False,
    },
    "Skywork/Skywork-OR1-7B": {
        **_QWEN2, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-1.7B-Base": {
        **_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 40_960, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""By hub id: the paper's students and teachers."""


def published_config(name: str) -> Any:
    """A config object of a known hub id, None for others."""
    from transformers import AutoConfig

    values = SHAPES.get(name)
    if values is None:
        return None
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)
