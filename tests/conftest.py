"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from shared_data import DATA, NO_DATA


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Commands may set the thread count of the process; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With SCOPE_NO_SKIPS=1 (as in CI) a test that skips fails the run: a missing part must not look like success.

    Only a checkout that has no benchmark data beside it may do without the tests that read them, and the tests against
    real vLLM servers are skipped where ``make test-serving`` does not name one.
    """
    if not os.environ.get("SCOPE_NO_SKIPS") or hasattr(session.config, "workerinput"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [
        report for report in reporter.stats.get("skipped", []) if not (_lacks_data(report) or _needs_vllm(report))
    ]
    if skipped:
        reporter.write_line(f"SCOPE_NO_SKIPS: {len(skipped)} tests skipped, the first {skipped[0].nodeid}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _needs_vllm(report: pytest.TestReport) -> bool:
    """Tests against real servers have an environment and a command of their own (make test-serving)."""
    return "no SCOPE_VLLM_PYTHON" in str(report.longrepr)


def _lacks_data(report: pytest.TestReport) -> bool:
    return not DATA.is_dir() and NO_DATA in str(report.longrepr)
