"""What every script does with an error that ends it."""

import errno

import pytest
import torch

from errors import UserError
from runtime.cli import EXIT_USER_ERROR, run


def cpu_allocation_that_fails(argv):
    torch.empty(1 << 62, dtype=torch.uint8)


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        (raising(UserError("give another")), "error: give another"),
        (raising(OSError(errno.ENOSPC, "full", "a.npy")), "error: no space left on the device while writing a.npy"),
        (
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")),
            "Tried to allocate 2 GiB.)",
        ),
        (cpu_allocation_that_fails, "error: out of memory: take a smaller batch"),
        (raising(MemoryError()), "error: out of memory: take a smaller batch"),
    ],
    ids=["user", "disk", "cuda", "cpu", "python"],
)
def test_one_line_and_exit_code(main, expected, capsys):
    assert run(main, []) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="mat1"):
        run(raising(RuntimeError("mat1 and mat2 cannot be multiplied")), [])
