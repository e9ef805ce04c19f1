"""The errors that a user can cause. This module imports nothing, so any process can use it."""


class SampleError(Exception):
    """A sample cannot be used; the text says why. The run continues without it.

    Attributes:
        kind: Kind of the problem in a word or two, by which samples can be counted.
    """

    def __init__(self, text: str, kind: str = "form"):
        super().__init__(text)
        self.kind = kind


class ConfigError(Exception):
    """A mistake in a config file or on the command line; the text says where, and what to do."""


class RunError(Exception):
    """A run cannot continue; the text says why, and what to do."""


class CheckpointError(Exception):
    """A checkpoint cannot be read, or does not match its config; the text says where."""
