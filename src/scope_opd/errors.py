"""The ScopeError family: every mistake that a user can make, as one line that says found, expected, remedy."""

from __future__ import annotations


class ScopeError(Exception):
    """Bad input, config or environment: exit code 2, one line on stderr, nothing lost.

    Args:
        found: what was found, with the value and its place ("objective.tau = 0").
        expected: what would have been right ("a number > 0").
        remedy: what to do about it ("set objective.tau, for example 1.0").
    """

    exit_code = 2

    def __init__(self, found: str, expected: str = "", remedy: str = "") -> None:
        self.found, self.expected, self.remedy = found, expected, remedy
        line = found
        if expected:
            line += f"; expected {expected}"
        if remedy:
            line += f"; {remedy}"
        super().__init__(line)


class ConfigError(ScopeError):
    """The config file or a ``--set`` override is wrong."""


class DataError(ScopeError):
    """A data file or one of its rows is wrong."""


class ModelError(ScopeError):
    """A model folder or tokenizer is wrong, or a pair does not fit together."""


class RunFolderError(ScopeError):
    """The run folder is occupied, not writable, or holds nothing to resume."""


class RunFailed(ScopeError):
    """The run itself failed (an alarm set to stop, NaN, a full disk): state was saved where possible; exit code 1."""

    exit_code = 1
