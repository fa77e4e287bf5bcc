"""The one exception for what a user can put right. Imports nothing, so that every package may raise it."""


class UserError(Exception):
    """Wrong path, wrong shape, missing weights, full disk: the message says what, where and what to do, in one line.

    Scripts print the message and exit with code 2 (``runtime.cli.run``); ``--debug`` shows the traceback.
    """


class TrainingFailed(Exception):
    """The training itself went wrong; the last good checkpoint is intact."""
