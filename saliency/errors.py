"""What is wrong with a run: each says the value, and the way out."""


class DataError(ValueError):
    """Data that is missing, broken or in an unknown layout; names the file or the value."""
