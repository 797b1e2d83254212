"""Rollout engines: who draws responses. ``local`` samples in the process, ``random`` supplies its randomness."""
