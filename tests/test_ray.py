"""A run under Ray: one function for all launchers; a worker that dies costs no more than the steps since a checkpoint."""

from __future__ import annotations

import signal
import threading

import pytest

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
        with Signals() as signals, pytest.raises(Interrupted, match="SIGINT"):
            assert request(signal.SIGINT)
            signals.poll()
        assert not request(signal.SIGINT)
