"""train_sendvae.py whose first save waits halfway, until it is let go on: python tests/paused_save.py FOLDER [flags].

FOLDER/saving then holds the number of the process that saves; a file FOLDER/go-on ends the wait.
"""

import os
import sys
import time
from pathlib import Path

import train_sendvae
from files import write_atomically
from runtime import checkpoint
from runtime.cli import run

write_safetensors = checkpoint.write_safetensors


def main(folder: Path, argv: list[str]) -> int:
    def paused(tensors, path) -> None:
        write_safetensors(tensors, path)
        if not (folder / "saving").exists():
            write_atomically(folder / "saving", str(os.getpid()).encode())
            while not (folder / "go-on").exists():
                time.sleep(0.01)

    checkpoint.write_safetensors = paused
    return run(train_sendvae.main, argv)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
