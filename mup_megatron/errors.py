"""The exceptions for what a user did wrong and for being told to end. Bugs are asserted or left to raise."""

__all__ = ["InputError", "Terminated"]


class InputError(ValueError):
    """Bad input: a file, a flag, a shape, a value.

    The message is one sentence or two for the user: what is wrong, where (file and key), and what to do.
    The command line prints it and exits with code 2.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM: what was under way has been left in order. The command line exits with code 143, as a shell tells it."""
