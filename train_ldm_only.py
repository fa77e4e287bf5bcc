"""REPA-E's name of train_ldm.py, so that its command lines work as they stand."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("train_ldm.py")), run_name="__main__")
