"""Hugging Face models in the process: loading them, reading log-probs off their heads, cutting batches.

Loads torch and transformers only when one of its modules is imported. Not covered: sampling (``rollout``) and scoring
rollouts (``teacher``).
"""
