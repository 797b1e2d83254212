"""What every test shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Commands may set the thread count of the process; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
