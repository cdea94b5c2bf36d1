"""The one exception for what a user did wrong. Not for bugs: those are asserted or left to raise."""

_LONGEST = 120


class InputError(ValueError):
    """Bad input: a file, a flag, a shape, a value.

    The message is one sentence or two for the user: what is wrong, where (file and key), and what to do.
    The command line prints it and exits with code 2.
    """


def shortened(value: object, longest: int = _LONGEST) -> str:
    """Something that comes out of a file, or a library's words about it, on one line and short enough for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
