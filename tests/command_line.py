"""Command lines from dictionaries of flags."""

from collections.abc import Mapping


def argv_of(values: Mapping[str, object]) -> list[str]:
    """``{"batch_size": 4}`` → ``["--batch-size", "4"]``; True is a bare flag, None is left out."""
    argv = []
    for key, value in values.items():
        if value is not None:
            argv += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return argv
