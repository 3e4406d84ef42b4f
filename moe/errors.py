"""The one exception for input that a person can correct."""


class BadInput(ValueError):
    """Input that a person can correct. The message is one sentence; commands print it and exit non-zero."""
