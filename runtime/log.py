"""What a command says while it works: the project's logger, and progress bars that it does not tear."""

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger("sendvae")
PROGRESS_SECONDS = "SENDVAE_PROGRESS_SECONDS"  # variable: between two lines of a progress bar in a file


def setup_logging(file: Path | None, level: int = logging.INFO) -> None:
    """Send the project's logger to the terminal, past progress bars, and to ``file``; silent where file is None."""
    logger.handlers.clear()
    logger.propagate = False
    if file is None:
        logger.addHandler(logging.NullHandler())
        return
    logger.setLevel(level)
    for handler in (_TqdmHandler(), logging.FileHandler(file)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def progress_bar(total: int, initial: int, description: str, unit: str, shown: bool) -> tqdm:
    """A progress bar with rate and ETA; one line every 30 seconds where the output is a file."""
    interval = 0.5 if sys.stderr.isatty() else float(os.environ.get(PROGRESS_SECONDS, 30.0))
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=not shown,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
    )


class _TqdmHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
