"""Weights on their way from the trainer to servers that sample: by files, or over connections."""
