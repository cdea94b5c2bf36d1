"""The one exception for what a user did wrong. Not for bugs: those are asserted or left to raise."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input: a file, a flag, a shape, a value.

    The message is one sentence or two for the user: what is wrong, where (file and key), and what to do.
    The command line prints it and exits with code 2.
    """
