"""``scope eval``."""

from __future__ import annotations

EXAMPLES = ""
