def train() -> int:
    """Placeholder."""
    return 0
