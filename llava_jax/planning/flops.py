"""Counts the operations of a compiled module's matrix products.

XLA's own analysis counts a loop's body once, whatever its length, and GPU library calls not at all.
So this reads the module's text: its dots, and what they become (convolutions on TPUs, calls of
cuBLAS and cuDNN on GPUs), as often as they run.
"""

import math
import re

from llava_jax.planning.hlo import Computation, Instruction, operands, sizes, total

TARGET = re.compile(r'custom_call_target="([^"]*)"')
SPLASH = re.compile(r"%splash_m[hq]a_(fwd|dkv|dq)_")
SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
"""Products in each of the splash kernels: QK, which all of them compute, and those with it."""
FLASH = re.compile(r'op_name="[^"]*/flash_(forward|keys|queries)/')
FLASH_PRODUCTS = {"forward": 2, "keys": 4, "queries": 3}
"""The same of the kernels in `models.flash`."""

TRITON = ("__gpu$xla.gpu.triton", "triton_kernel_call")  # of Pallas, before and after jax 0.10.2
LIBRARIES = ("__cublas", "__cudnn", "__onednn", "tpu_custom_call", *TRITON)
"""Whose custom calls compute; other targets (sorts, buffers, transfers) multiply nothing."""


def matmul_flops(text: str) -> int:
    """Floating-point operations of matrix products when a compiled module runs, on one device.

    A multiplication and an addition are two. Attention counts whole, masked or not.

    Args:
        text: The optimised module, as `jax.stages.Compiled.as_text` gives it.

    Raises:
        ValueError: A loop with products has no fixed length, a library call is not known, or the
            text is not that of a module.
    """
    return total(text, lambda *call: {"": _products(*call)})[""]


def _products(instruction: Instruction, scope: Computation) -> int:
    """Operations of an instruction itself, without the computations that it calls."""
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
        query, key = _operands(instruction, scope)[2:4]  # after what tells which blocks to compute
        return SPLASH_PRODUCTS[kernel[1]] * 2 * math.prod(query) * key[-2]
    if kernel := FLASH.search(instruction.attributes):
        query = _operands(instruction, scope)[0]
        return FLASH_PRODUCTS[kernel[1]] * 2 * math.prod(query) * query[1]
    if target.startswith(LIBRARIES):
        raise ValueError(f"cannot count the operations of {target}; teach flops.py")
    return 0


def _dot(product: Instruction, scope: Computation) -> int:
    """From the operands alone: a library's result has a workspace beside it."""
    left, right = _operands(product, scope)[:2]
    shared = [left[i] for kind in ("batch", "contracting") for i in _left_dims(product, kind)]
    return 2 * math.prod(left) * math.prod(right) // math.prod(shared)


def _left_dims(product: Instruction, kind: str) -> list[int]:
    """Dimensions of the left operand, from a dot's `{1}` or a library's JSON `["1"]`."""
    found = re.search(rf'lhs_{kind}_dim\w+"?[=:] ?[\[{{]([\d," ]*)', product.attributes)
    return [int(i) for i in re.findall(r"\d+", found[1])] if found else []


def _attention(call: Instruction, scope: Computation, products: int) -> int:
    """cuDNN's attention: QK and PV; backwards QK again and a gradient for each operand of both."""
    found = re.search(r'"intermediate_tensor_shape".*?"dimensions": ?\[(.*?)\]', call.attributes)
    if found is None:
        raise ValueError(f"cannot find the size of attention in {call.attributes[:300]}")
    logits = math.prod(int(size) for size in re.findall(r"\d+", found[1]))
    return products * 2 * logits * _operands(call, scope)[0][-1]


def _convolution(product: Instruction, scope: Computation) -> int:
    """Products with elements, not with the zeros around and between them.

    Batch dimensions of a dot become spatial ones on TPUs, nearly all of whose positions are zeros.
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
    """How often an element of a window, along one axis, meets an element of the input."""
    stride, spread, step = (
        int(window.get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window.get("pad", "0_0").split("_")[0])
    positions = (i * stride + k * step - before for i in range(results) for k in range(taps))
    return sum(at % spread == 0 and 0 <= at // spread < size for at in positions)


def _operands(instruction: Instruction, scope: Computation) -> list[list[int]]:
    return [sizes(shape) for shape in operands(instruction, scope)]
