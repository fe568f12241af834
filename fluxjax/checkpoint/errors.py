"""The error for a model's files."""


class WeightsError(ValueError):
    """A file of a model can't be read or written, or does not fit the network.

    The message names the file, the rule that it breaks, what it holds instead, and the remedy.
    """
