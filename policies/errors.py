"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: a wrong name, an impossible setting, an environment that returns NaN.

    The message is one clear line that says what was wrong, where, and what to do about it. The command line prints
    it without a traceback and exits with status 2. Mistakes of the program itself keep their built-in exception
    (ValueError, RuntimeError, ...), so that their traceback stays visible.
    """
