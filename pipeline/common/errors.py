"""Errors that a user can correct, and the exit codes of every command."""

DONE = 0
FAILED = 1
WRONG_USE = 2
PREEMPTED = 3  # stopped by a signal or a STOP file after saving: the same command resumes


class UserError(Exception):
    """Wrong use, configuration or input: printed as one paragraph, exit code 2, no traceback.

    The message names the value, the bound it broke and the setting (or file) to change.
    """


class StoreError(OSError):
    """A remote store fails temporarily, because of the network or the service.

    Printed as one paragraph, exit code 1: the same command continues where it stopped.
    """
