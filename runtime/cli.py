"""What every script's command line shares: help format, one-line errors, exit codes. Needs no torch."""

import argparse
import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from errors import TrainingFailed, UserError
from files import OUT_OF_REACH
from runtime.repae_flags import add_repae_flags, settle_repae_flags

EXIT_OK = 0
EXIT_FAILED = 1  # the run itself failed, e.g. a diverged training
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
LARGEST = 2**63  # what seeds, counts and steps are kept in
_WRONG_PATHS = {
    errno.ENOENT: "no such file or folder",
    errno.ELOOP: "a symbolic link that leads to itself; give another path",
    errno.ENOTDIR: "a part of this path is a file, not a folder; give another path",
    errno.EEXIST: "a file is where a folder is to be made; give another path",
    errno.EISDIR: "it is a folder, not a file; give another path",
    errno.EBUSY: "it is in use: another process is writing it, or a disk is mounted there; wait, or give another place",
    errno.ENAMETOOLONG: "the name is too long for the file system; give a shorter one",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's line breaks and appends the default where a flag has one worth showing."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help or ""
        return super()._get_help_string(action)


class Arguments(argparse.Namespace):
    """Parsed flags.

    Attributes:
        defaults: of the flags that have one; not among ``vars()``.
    """

    __slots__ = ("defaults",)


class ArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, which takes no abbreviated flags, and which knows REPA-E's flags."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        add_repae_flags(self)
        namespace, unknown = super().parse_known_args(args, Arguments() if namespace is None else namespace)
        settle_repae_flags(self, namespace)
        namespace.defaults = {action.dest: action.default for action in self._actions if action.default is not None}
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.splitlines())
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message} (--help lists the flags)\n")


def add_debug_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error instead of its one line")


def flag_of(name: str) -> str:
    """``batch_size`` → ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = _number(text, int)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def non_negative_int(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    value = _number(text, int)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    value = _number(text, float)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text}")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = _number(text, float)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value


def finite_float(text: str) -> float:
    """An argparse type: a finite number."""
    value = _number(text, float)
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def at_least_one(text: str) -> float:
    """An argparse type: a finite number of at least 1."""
    value = finite_float(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def fraction(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    value = _number(text, float)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def fraction_below_one(text: str) -> float:
    """An argparse type: a number in [0, 1)."""
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("must be less than 1")
    return value


def or_auto(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: of another one, or ``auto``."""
    return lambda text: text if text == "auto" else kind(text)


def _number(text: str, kind: type):
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
    if kind is int and abs(value) >= LARGEST:
        raise argparse.ArgumentTypeError(f"must be less than {LARGEST}, got {text[:40]}")
    return value


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``main(argv)`` and turn what the user got wrong into one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    program = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text, nor a terminal know them
    try:
        return main(argv) or EXIT_OK
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except TrainingFailed as error:
        print(f"{program}: training failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Exception as error:
        message = _one_line(error)
        if message is None or "--debug" in argv:
            raise
        print(f"{program}: error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR


def answer_early(parse: Callable[[Sequence[str]], object]) -> None:
    """Answer ``--help`` and wrong flags at once: a script calls it between its flags and the imports that take seconds.

    Args:
        parse: reads and checks the flags; a :class:`UserError` ends the script with exit code 2.
    """
    if code := run(lambda argv: parse(argv) and EXIT_OK):
        sys.exit(code)


def _one_line(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())  # what it quotes may hold any character
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the device{where}; free some and run the same command again: what is complete is kept"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return f"{error.filename} may not become that large here (ulimit -f, or the file system)"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission for {error.filename}: let its owner give it to you (chmod), or take another place"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{error.filename} is on a file system that is read-only; take another place"
    if isinstance(error, OSError) and error.errno in OUT_OF_REACH:
        return f"{error.filename}: {error.strerror}: the file system is at fault; try again when it is well"
    if isinstance(error, OSError) and error.errno in _WRONG_PATHS and error.filename:
        return f"{str(error.filename)[:300]}: {_WRONG_PATHS[error.errno]}"
    if is_out_of_memory(error):
        return f"out of memory: take a smaller batch or, in training, --micro-batch-size auto ({_first_line(error)})"
    return None


# By torch's allocators (CUDA's has a class, known by name: this module does without torch), by a kernel that is loaded
# late, by cuBLAS, and by cuDNN, which finds no algorithm whose work space it can have.
_MEMORY_MESSAGES = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the machine or of a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MEMORY_MESSAGES)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


@contextmanager
def out_of_memory_means(remedy: str | Callable[[], str]) -> Iterator[None]:
    """Context: memory that runs out in it is the user's to mend, in these words, or in those that are then computed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = remedy if isinstance(remedy, str) else remedy()
        raise UserError(f"out of memory ({_first_line(error)}): {remedy}") from error
