"""Derivatives of activations on vectors, for the kernels of backward passes."""

from .numba_simd import add, compiled, divide, exp2, float32, minimum, multiply, multiply_add, splat


@compiled
def silu_and_derivative(x):
    """Return x s and s (1 + x (1 - s)), where s is the sigmoid of x. The exponential e gives 1 - s as e s."""
    exponential = exp2(minimum(splat(float32(126.0)), multiply(x, splat(float32(-1.4426950409)))))
    sigmoid = divide(splat(float32(1.0)), add(exponential, splat(float32(1.0))))
    silu = multiply(x, sigmoid)
    return silu, multiply_add(multiply(silu, exponential), sigmoid, sigmoid)
