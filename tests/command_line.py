"""Command lines from dictionaries of flags."""

from collections.abc import Mapping


def argv_of(values: Mapping[str, object]) -> list[str]:
    """``{"batch_size": 4}`` → ``["--batch-size", "4"]``; True is a bare flag, a tuple several values, None left out."""
    argv = []
    for key, value in values.items():
        if value is not None:
            values_of = () if value is True else value if isinstance(value, tuple) else (value,)
            argv += [f"--{key.replace('_', '-')}", *map(str, values_of)]
    return argv
