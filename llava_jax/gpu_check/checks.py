"""Lists the checks of `llava-jax gpu-check`, from most to least knowledge per minute of a device.

To add a check, add a row to CHECKS.
"""

from functools import partial

from llava_jax.gpu_check import correctness, machine, resume, training
from llava_jax.gpu_check.cases import FULL, LORA, OPTIMIZER_HOSTED, QLORA, RESIDENT, STREAMED
from llava_jax.gpu_check.runner import Check

_peak = lambda *run: partial(training.peak, *run)

CHECKS = (
    Check("machine", "versions, device and host", 40, machine.describe_machine),
    Check("gradients", "gradients, streamed against resident", 135, correctness.gradients),
    Check("attention", "attention kernels against attention written out", 60,
          correctness.attention),
    Check("evaluation", "evaluation step, streamed against resident", 45, correctness.evaluation),
    Check("pinned_pool", "pinned pool against asked bytes", 40, machine.pinned_pool),
    Check("peak_lora", "peak against plan, LoRA resident", 90, _peak("large", LORA, RESIDENT)),
    Check("peak_streamed", "peak against plan, LoRA streamed", 90,
          _peak("large", LORA, STREAMED)),
    Check("peak_full", "peak against plan, full with optimizer on host", 90,
          _peak("medium", FULL, OPTIMIZER_HOSTED)),
    Check("peak_qlora", "peak against plan, QLoRA with optimizer on host", 90,
          _peak("large", QLORA, OPTIMIZER_HOSTED)),
    Check("speed", "speed of LoRA, resident and streamed", 150, training.speed),
    Check("resume", "kill and resume, bit for bit", 90, resume.kill_and_resume),
    Check("save", "host memory of a save and a restore", 60, resume.save_memory),
)  # fmt: skip
"""Checks in the order in which they run, with time limits in seconds. The sum of the limits may
exceed the time of the command: a check that ends early leaves its time to the others. On a CPU, all
models are small."""
