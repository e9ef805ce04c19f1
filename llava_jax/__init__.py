"""Fine-tunes LLaVA models in JAX, on the accelerators you have."""

import importlib
from typing import TYPE_CHECKING, Any

from llava_jax.distributed.environment import quiet_libraries

if TYPE_CHECKING:
    from llava_jax.generation.engine import generate as generate
    from llava_jax.generation.model import LlavaModel as LlavaModel

_HOMES = {"LlavaModel": "llava_jax.generation.model", "generate": "llava_jax.generation.engine"}

__all__ = ["LlavaModel", "generate"]

quiet_libraries()  # must run before any module imports JAX or transformers


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that config files load without JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
