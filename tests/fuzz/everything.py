"""Enters the properties of every op."""

from tests.fuzz import attention, conv, rnn, transformers  # noqa: F401
