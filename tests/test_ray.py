"""A run under Ray: a worker that dies costs no more than the steps since the last checkpoint."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from scope_opd.config import validate_config
from scope_opd.errors import ConfigError
from scope_opd.train.signals import Interrupted, Signals, request


class TestARunThatGetsNoSignals:
    """Ray runs the ranks in threads, where Python delivers no signals."""

    def test_stops_where_it_polls_and_never_inside_a_shielded_section(self) -> None:
        seen: list[str] = []

        def run() -> None:
            with Signals() as signals:
                assert request(signal.SIGTERM)
                try:
                    with signals.shielded():
                        signals.poll()
                        seen.append("shielded")
                except Interrupted as error:
                    seen.append(str(error))
                signals.poll()  # once: what the interruption leads to is not interrupted
                seen.append("saved")

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(10)
        assert seen == ["shielded", "SIGTERM", "saved"]

    def test_cannot_be_asked_before_it_has_begun(self) -> None:
        assert not request(signal.SIGINT)
        with Signals() as signals:
            assert request(signal.SIGINT)
            with pytest.raises(Interrupted, match="SIGINT"):
                signals.poll()
        assert not request(signal.SIGINT)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("workers", 0, r"launch.ray.workers = 0; expected greater than 0"),
        ("gpus_per_worker", 2, r"launch.ray.gpus_per_worker = 2; expected 0 or 1"),
        ("resources", {"GPU": 1.0}, r"launch.ray.resources names GPU; .*set launch.ray.gpus_per_worker"),
        ("placement", "near", r"launch.ray.placement = 'near'; expected 'pack'"),
        ("max_failures", -2, r"launch.ray.max_failures = -2"),
    ],
)
def test_a_wrong_setting_is_one_line(key: str, value: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        validate_config({"launch": {"ray": {key: value}}})
