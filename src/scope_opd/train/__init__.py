"""The trainer: credited rollouts to new weights, a run folder, checkpoints. It never learns which method ran."""

from scope_opd.train.engines import Engines, SurrogateSettings, TrainResult
from scope_opd.train.loop import train
from scope_opd.train.signals import RunInterrupted

__all__ = ["Engines", "RunInterrupted", "SurrogateSettings", "TrainResult", "train"]
