"""Where the public benchmarks lie that some tests read: SCOPE_DATA, or ``shared/data`` beside the checkout.

They are not part of the project. Without them those tests skip, and say so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

DATA = Path(os.environ.get("SCOPE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
NO_DATA = "benchmark data not found (set SCOPE_DATA)"


def data_file(name: str) -> Path:
    """A file such as ``eval/aime24.jsonl``; skips the test where the data are absent."""
    if not DATA.is_dir():
        pytest.skip(NO_DATA)
    path = DATA / name
    assert path.exists(), path
    return path


def data_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    with data_file(name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
