"""``scope compare``."""

from __future__ import annotations

EXAMPLES = ""
