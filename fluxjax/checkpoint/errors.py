"""The error for a model's files."""


class WeightsError(ValueError):
    """A model's file that can't be read or written, or does not fit the network. The message says what to do."""
