"""The dropout probability as the kernels apply it: a threshold on 32 random bits. Imports no triton."""


def threshold(dropout_p: float) -> int:
    """P 2^32, rounded; what is below it is dropped."""
    return min(round(dropout_p * 2**32), 0xFFFFFFFF)


def keep_probability(dropout_p: float) -> float:
    """The probability that `threshold` really gives; 0 for p = 1."""
    return 0.0 if dropout_p >= 1.0 else 1.0 - threshold(dropout_p) / 2**32


def threshold_bits(dropout_p: float) -> int:
    """The threshold as the int32 of the same bits: a launch then has one type for all probabilities."""
    bits = threshold(dropout_p)
    return bits - 2**32 if bits >= 2**31 else bits
