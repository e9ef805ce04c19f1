"""The memory that published recipes take by plan: the rows of `tools/plan.py --table`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe by a plan.

    Attributes:
        run: What it is, for people.
        config: A file in configs/.
        device: A name in llava_jax/devices.py.
        count: Devices.
        micro_size: Samples of a micro-batch on each.
        plan: Fields of `MemoryConfig` that are on.
        device_gib: What the row may take on a device.
        host_gib: The same in host memory, for each device.
    """

    run: str
    config: str
    device: str
    count: int
    micro_size: int
    plan: tuple[str, ...]
    device_gib: float
    host_gib: float


OPTIMIZER = ("offload_optimizer",)
STREAMED = ("offload_optimizer", "stream_weights")
ALL = (*STREAMED, "offload_activations")

ROWS = (
    Row("7B LoRA, nothing offloaded", "7b_lora", "rtx3090", 1, 4, (), 22.5, 0.5),
    Row("7B LoRA, streamed", "7b_lora", "rtx3090", 1, 1, STREAMED, 5.0, 16.0),
    Row("7B LoRA, streamed", "7b_lora", "rtx3090", 1, 8, STREAMED, 12.0, 16.0),
    Row("13B LoRA, streamed", "13b_lora", "rtx3090", 1, 1, STREAMED, 7.0, 30.0),
    Row("13B LoRA, streamed", "13b_lora", "rtx3090", 1, 8, STREAMED, 17.0, 30.0),
    Row("7B QLoRA", "7b_qlora", "rtx3090", 1, 1, OPTIMIZER, 6.5, 2.0),
    Row("13B QLoRA", "13b_qlora", "rtx3090", 1, 1, OPTIMIZER, 11.0, 3.0),
    Row("13B QLoRA of rank 512 and ViT LoRA", "13b_qlora_xtuner", "rtx3090", 8, 16,
        ("offload_optimizer", "offload_activations"), 22.5, 16.0),
    Row("7B full, nothing offloaded", "7b_full", "rtx3090", 8, 1, (), 15.0, 0.5),
    Row("7B full, optimizer on host", "7b_full", "rtx3090", 8, 8, OPTIMIZER, 11.0, 11.0),
    Row("7B full, streamed", "7b_full_1gpu", "rtx3090", 1, 1, STREAMED, 4.5, 104.0),
    Row("7B full, streamed", "7b_full_1gpu", "rtx3090", 1, 16, STREAMED, 16.0, 104.0),
    Row("13B full, streamed", "13b_full", "rtx3090", 8, 1, STREAMED, 2.5, 25.0),
    Row("7B LoRA, optimizer on host", "7b_lora", "v5e", 4, 1, OPTIMIZER, 6.5, 1.0),
    Row("7B LoRA, streamed", "7b_lora", "v5e", 1, 1, STREAMED, 6.5, 16.0),
)  # fmt: skip
