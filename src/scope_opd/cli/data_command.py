"""``scope data``."""
