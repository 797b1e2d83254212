def demo() -> int:
    """Placeholder."""
    return 0
