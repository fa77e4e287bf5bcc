"""The exceptions that users see, and how others are quoted. Imports nothing, so that every package may raise them."""


class UserError(Exception):
    """Wrong path, wrong shape, missing weights, full disk: the message says what, where and what to do, in one line.

    Scripts print the message and exit with code 2 (``runtime.cli.run``); ``--debug`` shows the traceback.
    """


class TrainingFailed(Exception):
    """The training itself went wrong; the last good checkpoint is intact."""


def one_line(error: Exception) -> str:
    """An exception's text on one line, without what exceeds 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
