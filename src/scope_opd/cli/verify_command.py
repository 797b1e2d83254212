"""``scope verify``."""

from __future__ import annotations

EXAMPLES = ""
