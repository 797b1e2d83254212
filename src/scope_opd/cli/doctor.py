def doctor() -> int:
    """Placeholder."""
    return 0
