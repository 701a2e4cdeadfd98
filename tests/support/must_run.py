"""pytest --must-run: a session in which nothing ran is a failure, whatever was skipped and for whatever reason."""

from __future__ import annotations

import pytest


class MustRun:
    """A pytest plugin that counts the tests that ran, of every worker."""

    def __init__(self) -> None:
        self.count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for the set-up, the call and the teardown of each test."""
        self.count += report.when == "call" and not report.skipped

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turns success into failure if there was nothing to succeed."""
        if self.count == 0 and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says so."""
        if self.count == 0:
            terminalreporter.write_line("no test ran: torch sees no GPU, or none of these tests is for this one")


def add_option(parser: pytest.Parser) -> None:
    """For conftest.py."""
    parser.addoption("--must-run", action="store_true", help="fail if every test is skipped")


def start(config: pytest.Config) -> None:
    """For conftest.py; with workers, in the process that they report to."""
    if config.getoption("must_run") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(MustRun())
