"""The zoo's tokenizer: a real ``PreTrainedTokenizerFast`` over 64 whole words, with a chat template.

A word is what stands between two spaces, so that decoding joins tokens with single spaces and gives the text back.
Prompt items are one token each (``-2``); in a response sign, value and total are three (``- 2 13``). A user message is
rendered as its content followed by `` :``; a system message, where there is one, stands in front. Words outside the
vocabulary (a system message, a suffix) become ``<unk>`` and do no harm beyond that.

Not covered: any other text than the task's.
"""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from scope_opd.zoo.task import MAX_VALUE, MODULUS

VOCABULARY_SIZE = 64
PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- message['content'] | trim -}}"
    "{%- if message['role'] == 'user' -%}{{- ' :' -}}{%- endif -%}"
    "{%- if not loop.last -%}{{- ' ' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if messages[-1]['role'] == 'assistant' and not add_generation_prompt -%}{{- ' ' + eos_token -}}{%- endif -%}"
)


def vocabulary() -> dict[str, int]:
    """Word to id, 64 entries: specials, signs and marks, totals 0..22, signed items, then unused fillers."""
    words = [PAD, EOS, BOS, UNK, "+", "-", "#", ":"]
    words += [str(total) for total in range(MODULUS)]
    words += [f"{sign}{value}" for sign in "+-" for value in range(1, MAX_VALUE + 1)]
    words += [f"<unused{index}>" for index in range(VOCABULARY_SIZE - len(words))]
    return {word: index for index, word in enumerate(words)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, made from nothing; ``save_pretrained`` gives files that AutoTokenizer loads."""
    backend = Tokenizer(WordLevel(vocabulary(), unk_token=UNK))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
