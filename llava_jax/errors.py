"""What is wrong with one sample of the data. This imports nothing, for processes of any kind."""


class SampleError(Exception):
    """A sample that cannot be learned from; its text says why. The run goes on without it.

    Attributes:
        kind: What is wrong, in a word or two that other samples share.
    """

    def __init__(self, text: str, kind: str = "form"):
        super().__init__(text)
        self.kind = kind


class ConfigError(Exception):
    """A mistake in a config file or on the command line; its text says where and what to do."""


class RunError(Exception):
    """A run cannot go on; its text says why, and what to do."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or is not what its config says; the text tells where."""
