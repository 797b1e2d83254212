"""The trainer: credited rollouts to new weights, a run folder, checkpoints. It never learns which method ran."""

from scope_opd.train.loop import Engines, TrainResult, train
from scope_opd.train.signals import RunInterrupted
from scope_opd.train.step import SurrogateSettings

__all__ = ["Engines", "RunInterrupted", "SurrogateSettings", "TrainResult", "train"]
