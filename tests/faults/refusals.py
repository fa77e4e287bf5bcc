"""Whether a job that could not do its work said so in one line, with exit code 2."""

from collections.abc import Sequence

from runtime.cli import EXIT_USER_ERROR
from tests.bad_inputs.case import errors_in
from tests.faults.forked import Job


def not_refused(job: Job, codes: Sequence[int], *parts: str) -> list[str]:
    """What is wrong with the answer of a job of one process.

    Args:
        job: that has ended.
        codes: its exit codes.
        parts: of the line; one of them must be in it.
    """
    (code,), (text,) = codes, job.errors
    if "Traceback" in text:
        return [f"exit code {code} and a traceback: {text.strip().splitlines()[-1]}"]
    lines = [line for line in errors_in(text) if "error: " in line]
    if code != EXIT_USER_ERROR or len(lines) != 1:
        return [f"exit code {code} and {len(lines)} lines: {lines or text[-300:]}"]
    if parts and not any(part in lines[0] for part in parts):
        return [f"the line names none of {', '.join(parts)}: {lines[0]}"]
    return []
