"""What generated Triton calls; copied into each generated module, so that it stands on its own."""

import triton
import triton.language as tl


@triton.jit
def floor_divide(a, b):
    """Of whole numbers, towards minus infinity."""
    quotient = a // b
    rest = a - quotient * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def modulo(a, b):
    """Of whole numbers, of the divisor's sign."""
    rest = a - a // b * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def floor_of_quotient(a, b):
    return tl.floor(tl.div_rn(tl.cast(a, tl.float32), tl.cast(b, tl.float32)))


@triton.jit
def maximum(a, b):
    """NaN in either comes through."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(value):
    """Relative error 2^-22: x + x^3 P(x^2) near 0 (minimax), elsewhere by exp(-2 |x|)."""
    x = tl.cast(value, tl.float32)
    size = tl.abs(x)
    square = x * x
    p = -5.89515801e-3 * square + 2.07959716e-2
    p = p * square - 5.37838303e-2
    p = p * square + 1.33319241e-1
    p = p * square - 3.3333298e-1
    near = x + x * square * p
    shrunk = tl.exp(-2.0 * size)
    far = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(size < 0.6, near, tl.where(x < 0, -far, far))
