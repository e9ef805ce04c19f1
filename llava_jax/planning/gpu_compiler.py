"""Finds the installed compiler for NVIDIA GPUs, and the versions of CUDA and cuDNN for it.

JAX's compiler for GPUs is a plugin, which an extra of this package installs together with NVIDIA's
libraries. XLA chooses algorithms by the versions of the libraries, so a plan uses the versions that
a run in the same environment would use.
"""

import dataclasses
import importlib.metadata
import re
from importlib.util import find_spec

from llava_jax.errors import ConfigError
from llava_jax.planning.devices import Gpu, Version


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A plugin of JAX that compiles for NVIDIA GPUs.

    Attributes:
        extra: Extra of this package that installs the plugin.
        module: Module of the plugin.
        runtime: Package of the CUDA runtime.
        cudnn: Package of cuDNN.
        built_with: Versions of CUDA and of cuDNN that the plugin was built with. They are used if
            `runtime` or `cudnn` is not installed, for example because JAX uses the libraries of the
            system.
        capability: Lowest compute capability that this version of CUDA compiles for.
    """

    extra: str
    module: str
    runtime: str
    cudnn: str
    built_with: tuple[Version, Version]
    capability: float

    @property
    def versions(self) -> tuple[Version, Version]:
        """Returns the versions of the CUDA runtime and of cuDNN."""
        cuda, cudnn = self.built_with
        cuda, cudnn = _installed(self.runtime) or cuda, _installed(self.cudnn) or cudnn
        # The third number of the package counts its builds; the runtime reports only two numbers.
        return (*cuda[:2], 0), cudnn


PLUGINS = (
    Plugin(
        extra="cuda13",
        module="jax_cuda13_plugin",
        runtime="nvidia-cuda-runtime",
        cudnn="nvidia-cudnn-cu13",
        built_with=((13, 0, 0), (9, 12, 0)),
        capability=7.5,
    ),
    Plugin(
        extra="cuda12",
        module="jax_cuda12_plugin",
        runtime="nvidia-cuda-runtime-cu12",
        cudnn="nvidia-cudnn-cu12",
        built_with=((12, 9, 0), (9, 8, 0)),
        capability=5.0,
    ),
)
"""The plugins, newest first, as JAX looks for them. Sources: the module `_versions` of each plugin
(JAX 0.12.0 for CUDA 13, JAX 0.10.2 for CUDA 12), and the release notes of CUDA 13.0 and 12.9."""


def target_config(target: Gpu) -> str:
    """Returns a description of an absent GPU for the installed compiler.

    Raises:
        ConfigError: No compiler for GPUs is installed, or the compiler does not support the GPU.
    """
    plugin = next((plugin for plugin in PLUGINS if find_spec(plugin.module)), None)
    if plugin is None:
        raise ConfigError(
            "planning for GPUs needs the GPU compiler: pip install -e '.[cuda13]', or "
            "'.[cuda12]' for drivers and GPUs that CUDA 13 does not support"
        )
    if float(target.capability) < plugin.capability:
        raise ConfigError(
            f"{target.name} has compute capability {target.capability}, but the installed "
            f"compiler ({plugin.extra}) supports only {plugin.capability} and higher; in a new "
            "environment: pip install -e '.[cuda12]'"
        )
    return target.target_config(*plugin.versions)


def _installed(package: str) -> Version | None:
    """Returns the version of an installed package; None if the package is not installed."""
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None
