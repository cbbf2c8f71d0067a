"""The one matrix product that all kernels use."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator):
    """`accumulator + a @ b`: (M, K), (K, N), (M, N) float32 -> (M, N) float32."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as raw 16-bit integers and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # "ieee" concerns float32 operands alone: without it they would be rounded to tf32.
    return tl.dot(a, b, accumulator, input_precision="ieee")
