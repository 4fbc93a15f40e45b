"""One error for data that is missing, cut short or not what it should be."""


class DataError(ValueError):
    """The message names the file, what is wrong with it, and what would be right."""
