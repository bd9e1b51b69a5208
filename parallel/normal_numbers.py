"""Normally distributed numbers by index: element i of a stream is a function of (key, i) and of nothing else.

A rank can so draw any part of a tensor without the rest, with the same bits. The bits are those of Philox4x64-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose raw output NumPy keeps stable; each gives two
uniform numbers of 32 bits. The inverse of the normal distribution is PPND7 of Wichura (1988, algorithm AS 241), with a
relative error of 1e-7. It is computed with +, -, *, / and sqrt in fp64 alone, which IEEE 754 rounds in one way, one
array operation at a time: no library's log or cos, whose last bit depends on the machine or the place in a vector.
"""

from __future__ import annotations

import numpy as np

LANES = 8  # 32-bit numbers in one Philox block of four 64-bit words
LN2 = 0.6931471805599453
SPLIT = 0.425  # PPND7: |p - 1/2| up to which one rational function serves, and beyond which another in sqrt(-log p)
CENTRE_TOP = (5.9109374720e01, 1.5929113202e02, 5.0434271938e01, 3.3871327179e00)
CENTRE_BOTTOM = (6.7187563600e01, 7.8757757664e01, 1.7895169469e01, 1.0)
TAIL_TOP = (1.7023821103e-01, 1.3067284816e00, 2.7568153900e00, 1.4234372777e00)
TAIL_BOTTOM = (1.2021132975e-01, 7.3700164250e-01, 1.0)
LOG_SERIES = tuple(2 / power for power in (13, 11, 9, 7, 5, 3, 1))  # of log((1 + s) / (1 - s)), see `_log`


class UniformBits:
    """The stream of 32-bit numbers of a 128-bit key, read at any place."""

    def __init__(self, key: int):
        self._philox = np.random.Philox(key=key, counter=0)
        self._block = 0  # the block that Philox gives next

    def read(self, start: int, count: int) -> np.ndarray:
        """uint32 [count]: elements [start, start + count)."""
        first, skipped = divmod(start, LANES)
        num_blocks = -(-(skipped + count) // LANES)
        if first != self._block:
            self._philox.advance(first - self._block)
        self._block = first + num_blocks
        words = self._philox.random_raw(4 * num_blocks)
        return words.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]


def inverse_normal(bits: np.ndarray) -> np.ndarray:
    """fp64 [n]: the standard normal quantile of (bits + 1/2) / 2^32, for uint32 bits; at most 6.34 in size.

    sqrt(-log p) stays below 5 for p >= 2^-33, so the third range of PPND7 is never reached.
    """
    q = bits.astype(np.float64)
    q -= 2.0**31 - 0.5
    q *= 2.0**-32  # p - 1/2, exact
    r = q * q
    np.subtract(SPLIT * SPLIT, r, out=r)
    result = _polynomial(CENTRE_TOP, r)
    result /= _polynomial(CENTRE_BOTTOM, r)
    result *= q
    tail = np.flatnonzero(r < 0.0)
    q = q[tail]
    r = _log(0.5 - np.abs(q))
    np.negative(r, out=r)
    np.sqrt(r, out=r)
    r -= 1.6
    quantile = _polynomial(TAIL_TOP, r)
    quantile /= _polynomial(TAIL_BOTTOM, r)
    result[tail] = np.copysign(quantile, q)
    return result


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """Horner's scheme, the highest power first."""
    result = coefficients[0] * x
    for coefficient in coefficients[1:-1]:
        result += coefficient
        result *= x
    result += coefficients[-1]
    return result


def _log(x: np.ndarray) -> np.ndarray:
    """The natural logarithm of positive numbers, to an absolute 1e-12."""
    mantissa, exponent = np.frexp(x)  # x = mantissa * 2^exponent, 1/2 <= mantissa < 1
    low = mantissa < 0.5**0.5
    mantissa[low] *= 2.0
    s = (mantissa - 1.0) / (mantissa + 1.0)  # mantissa = (1 + s) / (1 - s), |s| < 0.172
    log = _polynomial(LOG_SERIES, s * s)
    log *= s
    log += (exponent - low) * LN2
    return log
