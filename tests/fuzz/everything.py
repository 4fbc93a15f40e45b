"""Enters the properties of every op."""

from tests.fuzz import attention, conv, engines, hugging_face, rnn, transformers  # noqa: F401
