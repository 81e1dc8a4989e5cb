"""Products of matrices in Triton: of which sizes, and by what their operands are rounded to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# float16 takes TF32, which holds each of its numbers and the range of float32, so that sums and
# gradients cannot overflow; float32 three of them, nearly float32.
_ON_A_GPU = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}


def products_of(x: Tensor) -> str:
    """PRODUCTS of kernels whose inputs are as x."""
    return products_in(x.dtype, x.device)


def products_in(operands: torch.dtype, device: torch.device, *, tf32: bool = False) -> str:
    """PRODUCTS of kernels that round to ``operands``, float32 to TF32 if that is asked for.
    Triton's interpreter has no product of bfloat16; those of two bfloat16 numbers are exact in
    float32."""
    products = "tf32" if tf32 and operands == torch.float32 else _ON_A_GPU[operands]
    return "bf16-as-fp32" if products == "bf16" and device.type != "cuda" else products


def padded(size: int) -> int:
    """Rows or columns of a product of so many: it takes powers of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def product(a, b, PRODUCTS: tl.constexpr):
    """a @ b in float32 from operands rounded as PRODUCTS says: "bf16", "tf32", "tf32x3", or for the
    interpreter "bf16-as-fp32", rounded to bfloat16 and multiplied as float32."""
    if PRODUCTS == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRODUCTS == "bf16-as-fp32":
        return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRODUCTS)
