"""Errors a user can act on.

A script that meets one prints its message alone and exits with status 2 (`experiments/cli.py`); anything else is a bug
and keeps its traceback.
"""


class UserError(Exception):
    """What was wrong, where, and what would be right, in one message that needs no traceback."""
