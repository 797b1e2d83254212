"""The zoo: an embedded task, two small models and their data, on which the method can be seen to work in minutes.

``task`` (the running sum and its strict check) and ``verifier`` need neither torch nor transformers; ``tokenizer`` and
``build`` do. Importing this package loads none of them. Not covered: training on the task, which the rest of the
package does as with any other.
"""

from __future__ import annotations

from pathlib import Path

from scope_opd.errors import DataError, ModelError

__all__ = ["data_path", "model_path"]

_HERE = Path(__file__).parent
_MODELS = ("teacher", "student")
_SPLITS = ("train", "heldout")


def model_path(name: str) -> Path:
    """The folder of a shipped model, in Hugging Face layout: "teacher" or "student".

    Raises:
        ModelError: another name.
    """
    if name not in _MODELS:
        raise ModelError(f"zoo model {name!r}", "'teacher' or 'student'", "choose one of the two")
    return _HERE / "models" / name


def data_path(split: str) -> Path:
    """The JSON-lines file of a shipped split: "train" or "heldout".

    Raises:
        DataError: another name.
    """
    if split not in _SPLITS:
        raise DataError(f"zoo split {split!r}", "'train' or 'heldout'", "choose one of the two")
    return _HERE / "data" / f"{split}.jsonl"
