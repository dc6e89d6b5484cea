"""A pytest plugin that keeps a test run's outcome in the record of this machine.

    pytest -p bench.outcomes --outcomes suite bench/results tests

The outcome is written at the end, and every half a minute for a run that does not reach it.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.machine import open_record
from bench.record import Outcome, save

_SECONDS = 30


class Outcomes:
    """Counts reports and writes them as ``tests[name]`` of the record."""

    def __init__(self, name: str, results: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._record, self._path = open_record(results, device, ["bf16"])
        self._name = name
        self._passed, self._skipped, self._failed = 0, 0, list[str]()
        self._written = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the call of a test, or a set-up that skipped or broke it."""
        if report.failed:
            self._failed.append(report.nodeid)
        elif report.skipped:
            self._skipped += 1
        elif report.when == "call":
            self._passed += 1
        if time.monotonic() - self._written > _SECONDS:
            self._write(complete=False)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the last state; a run that was interrupted is not complete."""
        finished = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        self._write(complete=exitstatus in finished)

    def _write(self, complete: bool) -> None:
        outcome = Outcome(self._passed, self._failed, self._skipped, complete)
        self._record.tests[self._name] = outcome
        save(self._record, self._path)
        self._written = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the plugin."""
    parser.addoption("--outcomes", nargs=2, metavar=("NAME", "RESULTS"), help="keep the outcome")


def pytest_configure(config: Any) -> None:
    """Start, but not in the workers of a distributed run."""
    chosen = config.getoption("outcomes")
    if chosen and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(chosen[0], Path(chosen[1])))
