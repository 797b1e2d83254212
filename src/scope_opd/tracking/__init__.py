"""Metric trackers beside the run folder's own JSONL files: TensorBoard, Weights & Biases, trackio, each an extra.

Keys arrive unchanged; values that are None or no number are left out. Nothing here is imported before it is asked for.
"""

from scope_opd.tracking.base import Tracker, open_trackers

__all__ = ["Tracker", "open_trackers"]
