"""Counts the floating-point operations of the matrix products in a compiled module.

XLA's cost analysis counts the body of a loop only once, and does not count calls of GPU libraries.
So the functions here read the text of the compiled module. They find all dots, and also the
convolutions (on TPUs) and the calls of cuBLAS and cuDNN (on GPUs) that replace dots. Each
instruction is counted as often as it runs.
"""

import math
import re

from llava_jax.planning.hlo import Computation, Instruction, operands, sizes, total

TARGET = re.compile(r'custom_call_target="([^"]*)"')
SPLASH = re.compile(r"%splash_m[hq]a_(fwd|dkv|dq)_")
SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
"""Number of matrix products in each splash attention kernel; QK is computed in all of them."""
FLASH = re.compile(r'op_name="[^"]*/flash_(forward|keys|queries)/')
FLASH_PRODUCTS = {"forward": 2, "keys": 4, "queries": 3}
"""Number of matrix products in each kernel of `models.flash`; QK is computed in all of them."""

TRITON = ("__gpu$xla.gpu.triton", "triton_kernel_call")  # Pallas, before and after JAX 0.10.2
LIBRARIES = ("__cublas", "__cudnn", "__onednn", "tpu_custom_call", *TRITON)
"""Prefixes of the custom calls that may contain matrix products.

All other custom calls (sorts, buffers, transfers) have no products.
"""


def matmul_flops(text: str) -> int:
    """Returns the matrix-product FLOPs of one execution of a compiled module, on one device.

    A multiplication and an addition count as two operations. In attention, masked positions are
    counted too.

    Args:
        text: Text of the optimized module, from `jax.stages.Compiled.as_text`.

    Raises:
        ValueError: A loop with products has an unknown length, a library call is unknown, or the
            text does not describe a compiled module.
    """
    return total(text, lambda *call: {"": product_flops(*call)})[""]


def product_flops(instruction: Instruction, scope: Computation) -> int:
    """Returns the matrix-product FLOPs of one instruction, without the computations it calls."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "dot":
        return _dot(instruction, scope)
    if opcode == "convolution":
        return _convolution(instruction, scope)
    if opcode != "custom-call":
        return 0
    target = TARGET.findall(instruction.attributes)[0]
    if target.startswith(("__cublas$gemm", "__cublas$lt$matmul")):
        return _dot(instruction, scope)
    if target.startswith("__cudnn$fmha"):
        return _attention(instruction, scope, 5 if "Backward" in target else 2)
    if kernel := SPLASH.match(instruction.name):
        # The first two operands contain the blocks to compute.
        query, key = _operands(instruction, scope)[2:4]
        return SPLASH_PRODUCTS[kernel[1]] * 2 * math.prod(query) * key[-2]
    if kernel := FLASH.search(instruction.attributes):
        query = _operands(instruction, scope)[0]
        return FLASH_PRODUCTS[kernel[1]] * 2 * math.prod(query) * query[1]
    if target.startswith(LIBRARIES):
        raise ValueError(f"cannot count the operations of {target}; add it to planning/flops.py")
    return 0


def _dot(product: Instruction, scope: Computation) -> int:
    """Returns the FLOPs of a dot or a cuBLAS call, from the shapes of its operands.

    The result is not used, because the result of a library call also contains a workspace.
    """
    left, right = _operands(product, scope)[:2]
    shared = [left[i] for kind in ("batch", "contracting") for i in _left_dims(product, kind)]
    return 2 * math.prod(left) * math.prod(right) // math.prod(shared)


def _left_dims(product: Instruction, kind: str) -> list[int]:
    """Returns the "batch" or "contracting" dimensions of a product's left operand.

    A dot has the dimensions in the form `{1}`, and a library call has them as JSON, `["1"]`.
    """
    found = re.search(rf'lhs_{kind}_dim\w+"?[=:] ?[\[{{]([\d," ]*)', product.attributes)
    return [int(i) for i in re.findall(r"\d+", found[1])] if found else []


def _attention(call: Instruction, scope: Computation, products: int) -> int:
    """Returns the FLOPs of a cuDNN attention kernel with `products` matrix products.

    The forward kernel computes QK and PV. The backward kernel computes QK again, and a gradient for
    each operand of QK and of PV.
    """
    found = re.search(r'"intermediate_tensor_shape".*?"dimensions": ?\[(.*?)\]', call.attributes)
    if found is None:
        raise ValueError(f"cannot find the size of attention in {call.attributes[:300]}")
    logits = math.prod(int(size) for size in re.findall(r"\d+", found[1]))
    return products * 2 * logits * _operands(call, scope)[0][-1]


def _convolution(product: Instruction, scope: Computation) -> int:
    """Returns the FLOPs of a convolution; products with zeros of padding or dilation do not count.

    On TPUs, batch dimensions of a dot become spatial dimensions of a convolution, and nearly all
    positions along these dimensions are such zeros.
    """
    labels = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)[0]
    shapes = [*_operands(product, scope), sizes(product.shape)]
    image, kernel, out = (
        dict(zip(*pair, strict=True)) for pair in zip(labels, shapes, strict=True)
    )
    window = product.attributes.partition("window={")[2].partition("}")[0]
    count = 2 * out["b"] * out["f"] * kernel["i"]
    for axis in range(len(image) - 2):
        size, taps, results = (lengths[str(axis)] for lengths in (image, kernel, out))
        fields = re.findall(r"(\w+)=(\S+)", window)
        along = {name: value.split("x")[axis] for name, value in fields}
        count *= _meetings(size, taps, results, along)
    return count


def _meetings(size: int, taps: int, results: int, window: dict[str, str]) -> int:
    """Counts, along one axis, the products of a window element with an element of the input."""
    stride, spread, step = (
        int(window.get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window.get("pad", "0_0").split("_")[0])
    positions = (i * stride + k * step - before for i in range(results) for k in range(taps))
    return sum(at % spread == 0 and 0 <= at // spread < size for at in positions)


def _operands(instruction: Instruction, scope: Computation) -> list[list[int]]:
    """Returns the shapes of an instruction's operands as lists of sizes."""
    return [sizes(shape) for shape in operands(instruction, scope)]
