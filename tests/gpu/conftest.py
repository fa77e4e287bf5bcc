"""Time on a GPU is short: what fails is shown at once, so that a run that is cut off has said it."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        where = f"{report.nodeid} failed in {report.when} after {report.duration:.0f} s"
        print(f"\n{where}\n{report.longreprtext}", flush=True)
