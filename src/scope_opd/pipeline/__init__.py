"""The stream of a step: rollouts, verdicts, scores and complete groups; in the caller's thread or in one of its own."""

from scope_opd.pipeline.background import BackgroundPipeline
from scope_opd.pipeline.stream import Collected, GroupsHook, PhaseHook, Pipeline, ProgressHook, StageStats
from scope_opd.pipeline.timeline import STAGES, Timeline

__all__ = [
    "STAGES",
    "BackgroundPipeline",
    "Collected",
    "GroupsHook",
    "PhaseHook",
    "Pipeline",
    "ProgressHook",
    "StageStats",
    "Timeline",
]
