"""train_sendvae.py on several processes that wait for each other for LIMIT seconds at most, while the main one, for all
that it does alone, takes longer; the others must not look at a checkpoint's checksums.
"""

import os
import sys
import time
from datetime import timedelta

from accelerate.utils import InitProcessGroupKwargs

import models.encoders
import train_sendvae
import training.run
from runtime import checkpoint
from runtime.cli import run
from training.sendvae import SendVAE

LIMIT, LONGER = 8, 11


def slow(owner: object, name: str) -> None:
    function = getattr(owner, name)

    def late(*arguments, **options):
        time.sleep(LONGER)
        return function(*arguments, **options)

    setattr(owner, name, late)


def checksum(path) -> dict:
    raise AssertionError(f"{path} was read by a process that need not")


if __name__ == "__main__":
    training.run.InitProcessGroupKwargs = lambda timeout: InitProcessGroupKwargs(timeout=timedelta(seconds=LIMIT))
    if os.environ["RANK"] == "0":
        slow(checkpoint.CheckpointFolder, "newest_good")
        slow(checkpoint.CheckpointFolder, "save")
        slow(models.encoders, "build_encoders")
        slow(training.run.Run, "start")
        slow(SendVAE, "sample")
        slow(SendVAE, "finish")
    else:
        checkpoint.checksum = checksum
    sys.exit(run(train_sendvae.main, sys.argv[1:]))
