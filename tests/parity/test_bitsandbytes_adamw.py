"""AdamW with moments of 8 bits beside bitsandbytes on a CPU: codes and absmax, over 100 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llava_jax.train_step.adamw_8bit import (
    BLOCK,
    MIN_SIZE,
    Moment,
    numbers,
    scale_by_adam_8bit,
)

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.parity("quantisation", "bitsandbytes")

SHAPES = [
    *[(4096,), (5000,), (4095,)],  # vectors; the last one is too small
    *[(64, 64), (128, 64), (64, 128), (256, 256)],  # blocks of whole rows, or whole rows of blocks
    *[(100, 100), (33, 300), (7, 1152), (90, 48)],  # blocks that begin in the middle of rows
    (16, 3, 14, 14),
]

# As outside of tests: PyTorch and XLA then round a product and a sum together.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def gradients(shape: tuple[int, ...], steps: int) -> list[np.ndarray]:
    """Gradients of many magnitudes; in some steps, half of them are 0."""
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-6, 0, shape)
    found = []
    for step in range(steps):
        grad = rng.standard_normal(shape) * scale * 10.0 ** rng.uniform(-1, 1)
        found.append(np.where((step % 10 == 3) & (rng.random(shape) < 0.5), 0, grad))
    return [grad.astype(np.float32) for grad in found]


def codes(moment: Moment, count: int) -> np.ndarray:
    """The codes of a single tensor; the four codes of a number are a fourth of a block apart."""
    parts = np.asarray(moment.codes).view(np.uint8).reshape(-1, BLOCK // 4, 4)
    return parts.swapaxes(1, 2).ravel()[:count]


def test_the_numbers_are_the_same(assert_parity):
    for signed in (True, False):
        theirs = bnb.functional.create_dynamic_map(signed).numpy()
        assert_parity("numbers that differ, of 256", (numbers(signed=signed) != theirs).sum(), 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_over_a_hundred_steps(shape: tuple[int, ...], assert_parity):
    parameter = torch.nn.Parameter(torch.zeros(shape))
    theirs = bnb.optim.AdamW8bit([parameter], lr=1e-3, weight_decay=0.0)
    ours, zeros = scale_by_adam_8bit(), {"w": jnp.zeros(shape)}
    update, state = jax.jit(ours.update, compiler_options=OPTIMIZED), ours.init(zeros)
    differ, moved = 0, np.zeros(shape, np.float32)
    for grad in gradients(shape, 100):
        parameter.grad = torch.tensor(grad)
        theirs.step()
        scaled, state = update({"w": jnp.asarray(grad)}, state)
        moved -= np.float32(1e-3) * np.asarray(scaled["w"])
        found = theirs.state[parameter]
        for number, moment in enumerate((state.mu["w"], state.nu["w"]), 1):
            wanted = found[f"state{number}"].numpy()
            if isinstance(moment, Moment):
                differ += (codes(moment, wanted.size) != wanted.ravel()).sum()
                absmax = found[f"absmax{number}"].numpy()
                differ += (np.asarray(moment.absmax).ravel() != absmax).sum()
            else:
                differ += (np.asarray(moment) != wanted).sum()
    assert isinstance(state.mu["w"], Moment) == (parameter.numel() >= MIN_SIZE)
    assert_parity("codes and absmax that differ", int(differ), 0)
    apart = np.abs(moved - parameter.detach().numpy()).max() / np.abs(moved).max()
    assert_parity("weights, of the largest", apart, 2e-6)


def test_a_stack_is_updated_like_separate_tensors():
    shape = (3, 100, 100)  # 10,000 elements are not a whole number of blocks
    grads = gradients(shape, 5)
    stacked = scale_by_adam_8bit(stack_axes=lambda _: {"w": 1})
    single = scale_by_adam_8bit()
    state = stacked.init({"w": jnp.zeros(shape)})
    singles = [single.init({"w": jnp.zeros(shape[1:])}) for _ in range(3)]
    for grad in grads:
        scaled, state = stacked.update({"w": jnp.asarray(grad)}, state)
        for layer in range(3):
            own, singles[layer] = single.update({"w": jnp.asarray(grad[layer])}, singles[layer])
            np.testing.assert_allclose(scaled["w"][layer], own["w"], rtol=1e-6)
            np.testing.assert_array_equal(state.nu["w"].codes[layer], singles[layer].nu["w"].codes)
