"""What every test shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from shared_data import DATA, NO_DATA

# Tests against real vLLM servers have an environment and a command of their own (make test-serving).
collect_ignore = [] if os.environ.get("SCOPE_VLLM_PYTHON") else ["serving"]


# A shell's background job ignores SIGINT, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """What this run leaves out."""
    return "tests/serving: not collected (make test-serving)" if collect_ignore else "tests/serving: real vLLM servers"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Commands may set the thread count of the process; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With SCOPE_NO_SKIPS=1 (as in CI) a test that skips fails the run: a missing part must not look like success.

    Only a checkout that has no benchmark data beside it may do without the tests that read them.
    """
    if not os.environ.get("SCOPE_NO_SKIPS") or hasattr(session.config, "workerinput"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [report for report in reporter.stats.get("skipped", []) if not _lacks_data(report)]
    if skipped:
        reporter.write_line(f"SCOPE_NO_SKIPS: {len(skipped)} tests skipped, the first {skipped[0].nodeid}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _lacks_data(report: pytest.TestReport) -> bool:
    return not DATA.is_dir() and NO_DATA in str(report.longrepr)
