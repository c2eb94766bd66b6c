"""exp, log and the angles of Box and Muller in float64, the same bits on every processor.

IEEE 754 defines the results of +, -, *, /, sqrt and rounding exactly; this file uses only these,
frexp and ldexp. The exp, log and cos of numpy and torch are not exact: their last bits depend on
the processor and on the length of the array.
"""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LN2_HIGH = 0.6931471803691238  # ln 2 in two parts; the first has 21 zero bits at its end, so that
_LN2_LOW = 1.9082149292705877e-10  # k * _LN2_HIGH is exact (fdlibm, e_exp.c)
# Series, the highest power first; the first term left out is below 1e-17 of the value.
_EXP = [1 / math.factorial(k) for k in reversed(range(14))]  # in r
_ATANH = [1 / (2 * k + 1) for k in reversed(range(12))]  # in s^2, times s
_COS = [(-1) ** k / math.factorial(2 * k) for k in reversed(range(10))]  # in a^2
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in reversed(range(9))]  # in a^2, times a


def _polynomial(coefficients: list[float], x: Floats) -> Floats:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += coefficient
    return value


def portable_exp(x: Floats) -> Floats:
    """Return exp(x) to about one unit in the last place; non-finite values give NaN."""
    k = np.rint(x / math.log(2))
    with np.errstate(invalid="ignore", over="ignore"):
        r = (x - k * _LN2_HIGH) - k * _LN2_LOW  # |r| <= ln(2) / 2
        return np.ldexp(_polynomial(_EXP, r), k.astype(np.int64))


def portable_log(x: Floats) -> Floats:
    """Return ln(x) for finite x > 0, to a few units in the last place."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    m = np.where(low, 2 * mantissa, mantissa)  # in [sqrt(1/2), sqrt(2))
    k = (exponent - low).astype(np.float64)
    s = (m - 1) / (m + 1)  # ln m = 2 atanh s, |s| < 0.172
    return k * _LN2_HIGH + (2 * s * _polynomial(_ATANH, s * s) + k * _LN2_LOW)


def portable_cos_sin(turns: Floats) -> tuple[Floats, Floats]:
    """Return cos and sin of 2 pi `turns`, turns in [0, 1] with at most 50 bits after the point."""
    quarter = np.rint(4 * turns)
    angle = (turns - quarter / 4) * (2 * math.pi)  # the difference is exact; |angle| <= pi / 4
    square = angle * angle
    cos, sin = _polynomial(_COS, square), angle * _polynomial(_SIN, square)
    odd = (quarter % 2).astype(np.bool_)
    cos, sin = np.where(odd, sin, cos), np.where(odd, cos, sin)
    cos[(quarter == 1) | (quarter == 2)] *= -1
    sin[(quarter == 2) | (quarter == 3)] *= -1
    return cos, sin
