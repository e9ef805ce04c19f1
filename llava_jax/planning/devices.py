"""Lists the accelerators for which a run can be planned. They do not have to be attached.

To add a GPU, add a row to GPUS; to add a TPU, add a row to TPUS. No other module needs a change.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from llava_jax.distributed.environment import GIB

BFLOAT16_CAPABILITY = 8.0
"""Lowest compute capability with units for bfloat16 products, from NVIDIA's CUDA C++ Programming
Guide. On older GPUs, XLA converts the operands to float32, and computes the products there."""


Version = tuple[int, int, int]
"""Type of a version: major, minor and patch number."""


class Rates(NamedTuple):
    """Peak rates of a device.

    Attributes:
        products: FLOPs of bfloat16 matrix products per second.
        memory: Bytes that are read from or written to device memory per second.
        pcie: Bytes that are copied from or to host memory per second, in one direction.
        link: Bytes that are copied to another device per second, in one direction.
    """

    products: float
    memory: float
    pcie: float
    link: float


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties of an NVIDIA GPU that XLA's compiler needs, from NVIDIA's data sheets.

    Attributes:
        name: Name that the driver reports.
        capability: Compute capability, such as "8.6".
        gib: Size of the memory that the driver reports, in GiB.
        bandwidth: Bandwidth of the memory, in 10^9 bytes per second.
        clock: Clock rate, in GHz.
        cores: Number of streaming multiprocessors.
        fpus: Number of float32 units per multiprocessor.
        threads: Largest number of resident threads per multiprocessor.
        shared_kib: Size of the shared memory per multiprocessor, in KiB.
        l2_mib: Size of the level-2 cache, in MiB.
        tflops: Peak speed of dense bfloat16 matrix products with float32 sums, in 10^12 operations
            per second; None if the GPU has no bfloat16 units, or if no figure is published.
        lanes: Number of PCIe lanes.
        nvlink: Bandwidth of NVLink in one direction, in 10^9 bytes per second; 0 without NVLink.
        shares_host: Whether the GPU has no memory of its own, but shares the memory of its host.
    """

    platform: ClassVar = "gpu"
    name: str
    capability: str
    gib: float | int
    bandwidth: int
    clock: float | int
    cores: int
    fpus: int
    threads: int
    shared_kib: int
    l2_mib: int
    tflops: float | None
    lanes: int = 16
    nvlink: int = 0
    shares_host: bool = False

    @property
    def memory(self) -> int:
        """Returns the size of the memory that the driver reports, in bytes."""
        return int(self.gib * GIB)

    @property
    def rates(self) -> Rates:
        """Returns the peak rates. If no speed is published for products, it is computed."""
        computed = self.cores * GEFORCE_PRODUCTS * self.clock / 1e3
        if float(self.capability) < BFLOAT16_CAPABILITY:
            computed = self.float32_tflops
        products = self.tflops or computed
        pcie = self.lanes * PCIE_LANE[min(int(float(self.capability)), 9)]
        return Rates(products * 1e12, self.bandwidth * 1e9, pcie * 1e9, (self.nvlink or pcie) * 1e9)

    @property
    def float32_tflops(self) -> float:
        """Returns the peak speed of float32 products, in 10^12 operations per second.

        Each float32 unit computes one product and one sum per cycle.
        """
        return 2 * self.fpus * self.cores * self.clock / 1000

    def target_config(self, cuda: Version, cudnn: Version) -> str:
        """Returns the text of the GpuTargetConfigProto that describes the GPU to XLA's compiler.

        Args:
            cuda: Version of the CUDA runtime that the compiled program will use.
            cudnn: Version of cuDNN that the compiled program will use.
        """
        major, minor = self.capability.split(".")
        version = lambda numbers: "major: {} minor: {} patch: {}".format(*numbers)
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  device_memory_size: {self.memory}
  memory_bandwidth: {self.bandwidth * 10**9}
  clock_rate_ghz: {self.clock}
  l2_cache_size: {self.l2_mib * 2**20}
  core_count: {self.cores}
  fpus_per_core: {self.fpus}
  threads_per_core_limit: {self.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_core: {self.shared_kib * 1024}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {(self.shared_kib - 1) * 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ {version(cudnn)} }}
runtime_version {{ {version(cuda)} }}
device_description_str: "{self.name}"
"""


PCIE_LANE = {7: 0.985, 8: 1.969, 9: 3.938}
"""Bandwidth of a PCIe lane in one direction, in 10^9 bytes per second, by the first number of the
compute capability. GPUs of capability 7 have PCIe 3.0, of 8 PCIe 4.0, and of 9 or more PCIe 5.0."""

GEFORCE_PRODUCTS = 512
"""FLOPs of dense bfloat16 products with float32 sums, per multiprocessor and clock cycle, of
GeForce GPUs of compute capability 8.6 and later. They follow from the published speeds, for
example 165.2 TFLOP/s for the 128 multiprocessors of an RTX 4090 at 2.52 GHz."""


TPU_PCIE = 31.5
"""Bandwidth between a TPU and its host in 10^9 bytes per second. This is an assumption (PCIe 4.0
with 16 lanes), because Google publishes no figure."""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Properties of a TPU generation, from Google's data sheets.

    Attributes:
        name: Name that a chip reports.
        topology: XLA's name of the generation.
        memory: Size of the memory (HBM) of one chip, in bytes.
        tflops: Peak speed of dense bfloat16 matrix products with float32 sums on one chip, in 10^12
            operations per second.
        chips: Shape of the slice in XLA's notation, for each possible number of chips.
        bandwidth: Bandwidth of the memory, in 10^9 bytes per second.
        cores: XLA's configuration of a chip. With "megacore", the two cores of a v4 chip are one
            device.
    """

    platform: ClassVar = "tpu"
    name: str
    topology: str
    memory: int
    tflops: float
    chips: dict[int, str]
    bandwidth: int
    cores: str = "default"

    @property
    def rates(self) -> Rates:
        """Returns the peak rates."""
        return Rates(self.tflops * 1e12, self.bandwidth * 1e9, TPU_PCIE * 1e9, TPU_PCIE * 1e9)

    def slice_of(self, count: int) -> dict[str, Any]:
        """Returns the arguments of `jax.experimental.topologies.get_topology_desc` for a slice.

        Args:
            count: Number of chips; a key of `chips`.
        """
        name = f"{self.topology}:{self.chips[count]}"
        host = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}  # the default is 4 chips
        return {"topology_name": name, "platform": "tpu", "chip_config_name": self.cores, **host}


GPUS = {
    "rtx3060": Gpu("NVIDIA GeForce RTX 3060", "8.6", 11.76, 360, 1.777, 28, 128, 1536, 100, 3,
                   None),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", "8.6", 23.69, 936, 1.695, 82, 128, 1536, 100, 6,
                   71.0),
    "rtx4060": Gpu("NVIDIA GeForce RTX 4060", "8.9", 7.75, 272, 2.46, 24, 128, 1536, 100, 24, None,
                   lanes=8),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", "8.9", 23.64, 1008, 2.52, 128, 128, 1536, 100, 72,
                   165.2),
    "rtx5070": Gpu("NVIDIA GeForce RTX 5070", "12.0", 11.5, 672, 2.512, 48, 128, 1536, 100, 48,
                   61.7),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", "12.0", 31.36, 1792, 2.407, 170, 128, 1536, 100, 96,
                   209.5),
    # With ECC, which takes a sixteenth of the memory.
    "rtx6000-ada": Gpu("NVIDIA RTX 6000 Ada Generation", "8.9", 44.43, 960, 2.505, 142, 128, 1536,
                       100, 96, 364.2),
    "a10": Gpu("NVIDIA A10", "8.6", 22.06, 600, 1.695, 72, 128, 1536, 100, 6, 125.0),
    "l4": Gpu("NVIDIA L4", "8.9", 22.17, 300, 2.04, 58, 128, 1536, 100, 48, 121.0),
    "l40s": Gpu("NVIDIA L40S", "8.9", 44.4, 864, 2.52, 142, 128, 1536, 100, 96, 362.0),
    "t4": Gpu("Tesla T4", "7.5", 14.56, 320, 1.59, 40, 64, 1024, 64, 4, None),
    "v100-32g": Gpu("Tesla V100-SXM2-32GB", "7.0", 31.73, 900, 1.53, 80, 64, 2048, 96, 6, None,
                    nvlink=150),
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", "8.0", 39.39, 1555, 1.41, 108, 64, 2048, 164, 40,
                    312.0, nvlink=300),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", "8.0", 79.14, 2039, 1.41, 108, 64, 2048, 164, 40,
                    312.0, nvlink=300),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "9.0", 79.11, 3352, 1.98, 132, 128, 2048, 228, 50, 989.4,
                nvlink=450),
    "h200": Gpu("NVIDIA H200", "9.0", 139.8, 4800, 1.98, 132, 128, 2048, 228, 50, 989.4,
                nvlink=450),
    "b200": Gpu("NVIDIA B200", "10.0", 178.4, 8000, 1.965, 148, 128, 2048, 228, 126, 2250.0,
                nvlink=900),
    "gb200": Gpu("NVIDIA GB200", "10.0", 184.0, 8000, 2.062, 152, 128, 2048, 228, 126, 2500.0,
                 nvlink=900),
    "gb10": Gpu("NVIDIA GB10", "12.1", 119.7, 273, 2.418, 48, 128, 1536, 100, 24, None,
                shares_host=True),
}  # fmt: skip

V5E_SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}

TPUS = {
    "v5e": Tpu("TPU v5 lite", "v5e", 16 * GIB, 197.0, V5E_SLICES, 819),
    "v6e": Tpu("TPU v6 lite", "v6e", 32 * GIB, 918.0, V5E_SLICES, 1640),
    "v5p": Tpu(
        "TPU v5p", "v5p", 95 * GIB, 459.0, {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"}, 2765
    ),
    "v4": Tpu(
        "TPU v4",
        "v4",
        32 * GIB,
        275.0,
        {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"},
        1228,
        "megacore",
    ),
}


def bfloat16_tflops(name: str) -> float | None:
    """Returns a device's peak speed of bfloat16 products, in 10^12 operations per second.

    Args:
        name: Name that the device reports.

    Returns:
        The peak speed; None if the device is unknown, if it has no bfloat16 units, or if no figure
        is published.
    """
    devices = (*GPUS.values(), *TPUS.values())
    return next((device.tflops for device in devices if device.name == name), None)


def rates_of(name: str) -> Rates | None:
    """Returns the peak rates of a device; None if the device is unknown.

    Args:
        name: Name in `GPUS` or `TPUS`, or name that the device reports.
    """
    devices = {**GPUS, **TPUS}.items()
    known = (device.rates for key, device in devices if name in (key, device.name))
    return next(known, None)


def shares_host(name: str) -> bool:
    """Returns True if a device has no memory of its own, but shares the memory of its host.

    Args:
        name: Name in `GPUS`, or name that the device reports.
    """
    return any(gpu.shares_host and name in (key, gpu.name) for key, gpu in GPUS.items())


def without_bfloat16(name: str, capability: str, flops: int | None = None) -> str | None:
    """Returns a line that says how slow a GPU without bfloat16 units is, for runs in bfloat16.

    Args:
        name: Name that the GPU reports.
        capability: Compute capability of the GPU; "" if the device is not an NVIDIA GPU.
        flops: FLOPs of the matrix products of one optimizer step, or None.

    Returns:
        The line; None if the device has bfloat16 units, or is not an NVIDIA GPU.
    """
    is_nvidia = capability[:1].isdigit()  # AMD's names begin with "gfx"
    if not is_nvidia or float(capability) >= BFLOAT16_CAPABILITY:
        return None
    line = f"slow: {name} has no bfloat16 units, so XLA computes bfloat16 products in float32"
    gpu = next((gpu for gpu in GPUS.values() if gpu.name == name), None)
    if gpu is None:
        return line
    line += f", with at most {gpu.float32_tflops:.1f} TFLOP/s"
    if flops is None:
        return line
    minutes = flops / gpu.float32_tflops / 1e12 / 60
    return f"{line}; an optimizer step takes at least {minutes:.1f} minutes"
