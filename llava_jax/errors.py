"""Defines the errors that a user can cause. This module imports no other modules."""


class SampleError(Exception):
    """Raised if a sample cannot be used; the run continues without the sample.

    Args:
        text: Message that says what is wrong with the sample.
        kind: Kind of the problem in one or two words, for counting problems by kind.
    """

    def __init__(self, text: str, kind: str = "form"):
        super().__init__(text)
        self.kind = kind


class ConfigError(Exception):
    """Raised for a mistake in a config or a command; the message says where and what to do."""


class RunError(Exception):
    """Raised if a run cannot continue; the message says why and what to do."""


class CheckpointError(Exception):
    """Raised if a checkpoint cannot be read or does not match its config; the message says why."""
