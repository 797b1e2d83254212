"""A judge that does to its process what the prediction says. Workers import it by name; it needs no maths."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from scope_opd.gold import MathGold
from scope_opd.types import Verdict
from scope_opd.verify.math.settings import MathSettings


def obedient(prediction: str, gold: MathGold, problem: str | None, settings: MathSettings) -> Verdict:
    """Right if the prediction is the gold answer; the rest of its words are orders."""
    print("noise between the lines")
    word, _, rest = prediction.partition(" ")
    if word == "spin":
        while True:
            pass
    if word == "power":
        _ = (10**8) ** (10**8)  # one C loop of minutes, which looks at no signal
    if word == "sleep":
        time.sleep(1000)
    if word == "signal":
        os.kill(os.getpid(), int(rest))
    if word == "orphan":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    if word == "exit":
        os._exit(int(rest))
    if word == "memory":
        kept = []
        try:
            while True:
                kept.append(bytearray(2**20))
        except MemoryError:
            return Verdict(correct=False, reward=0.0, reason="swallowed")
    if word == "flood":
        sys.stderr.write("x" * 2**20)
        sys.stdout.write("x" * 2**20)
    if word == "raise":
        raise ValueError("two\nlines")
    facts = {
        "pid": os.getpid(),
        "worker": os.getppid(),
        "environment": dict(os.environ),
        "torch": "torch" in sys.modules,
        "tolerance": settings.tolerance is not None and settings.tolerance.relative,
    }
    correct = prediction in gold.alternatives[0]
    return Verdict(correct=correct, reward=float(correct), extracted=prediction, reason=json.dumps(facts))


def unable(prediction: str, gold: MathGold, problem: str | None, settings: MathSettings) -> Verdict:
    raise RuntimeError("the judge\ndoes not work here")


def deadly(prediction: str, gold: MathGold, problem: str | None, settings: MathSettings) -> Verdict:
    os._exit(9)
