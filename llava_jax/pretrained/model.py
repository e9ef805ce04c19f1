"""From a checkpoint to a model: shapes first, then shardings, then weights straight into place."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int

from llava_jax.config import (
    MeshConfig,
    ModelConfig,
    Parts,
    Quantisation,
    format_source,
    parse_source,
)
from llava_jax.data.templates import TEMPLATES
from llava_jax.distributed.sharding import make_mesh, with_shardings
from llava_jax.errors import CheckpointError
from llava_jax.models import lora
from llava_jax.models.build import initialise, quantised_shapes
from llava_jax.models.compute import ComputeConfig
from llava_jax.models.layers import Abstract, Params, merge, split
from llava_jax.models.llava import Llava
from llava_jax.models.paths import is_adapter
from llava_jax.models.stack import jit_loop
from llava_jax.pretrained.adapters import check_base, open_adapter
from llava_jax.pretrained.load import fingerprint, load_params
from llava_jax.pretrained.model_config import (
    read_config,
    write_model_config,
)
from llava_jax.pretrained.processor import choose_template, save_processor
from llava_jax.pretrained.resolve import Checkpoint, resolve
from llava_jax.pretrained.save import save_params
from llava_jax.pretrained.tokenizer import has_tokenizer


def load_weights(
    source: Path | Parts | None,
    config: ModelConfig,
    abstract: Abstract,
    *,
    seed: int,
    wanted: Collection[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> Params:
    """Parameters from a checkpoint, and fresh ones where it has none.

    Args:
        source: The result of `resolve`; None initialises all parameters.
        config: The model.
        abstract: Shapes, dtypes and shardings of all parameters, adapters included.
        seed: For fresh ones: adapters, and a projector that `source` lacks.
        wanted: Only these are loaded or made; the checkpoint is checked in full all the same.
        say: Told of a projector that `source` lacks.
    """
    wanted = abstract.keys() if wanted is None else wanted
    base = {path: leaf for path, leaf in abstract.items() if not is_adapter(path)}
    params = {} if source is None else load_params(source, config, base, wanted=wanted)
    fresh = {path: abstract[path] for path in wanted if path not in params}
    if say and source is not None and any(path.startswith("projector.") for path in fresh):
        say(f"{format_source(source)} has no projector: this is a new one, from seed {seed}")
    return params | initialise(fresh, seed)


@partial(jit_loop, static_argnums=0)
def logits(graphdef: nnx.GraphDef, params: Params, *inputs: Any) -> jax.Array:
    """`models.llava.Llava.__call__` of a structure and its parameters; compiled for each shape."""
    return Llava.__call__(cast("Llava", merge(graphdef, params)), *inputs)


class LlavaModel(Llava):
    """A LLaVA with its weights; call it for logits, see `models.llava.Llava.__call__`."""

    source: Path | Parts | None = None

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        pixel_values: Float[ArrayLike, "I C Y X"] | None = None,
        attention_mask: Int[ArrayLike, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """As `models.llava.Llava.__call__`; compiled once for each shape."""
        return logits(*split(self), input_ids, pixel_values, attention_mask)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Parts,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        quantize: Quantisation | None = None,
    ) -> "LlavaModel":
        """Reads a checkpoint.

        Args:
            path: A directory in a layout of `pretrained.layouts`, a run's directory, a hub id, or
                parts, also as text: llm=DIR,vision=DIR,projector=FILE.
            dtype: The dtype of the weights and the computation, "float32" or "bfloat16".
            mesh: A mesh of `make_mesh` over which the weights are sharded; None is one device.
            quantize: How the decoder's linears are kept in fewer bits; None keeps them whole.

        Raises:
            ConfigError: There is no such checkpoint, or it cannot be quantised.
            CheckpointError: It is not a LLaVA of a known kind, or not whole.
        """
        source = parse_source(path) if isinstance(path, str) else path
        return cls.from_checkpoint(resolve(source), dtype, mesh, quantize)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        quantize: Quantisation | None = None,
    ) -> "LlavaModel":
        """Reads what `resolve` has found. For all else, see `from_pretrained`.

        Args:
            checkpoint: The base, and perhaps an adapter on it.
            dtype: As for `from_pretrained`.
            mesh: As for `from_pretrained`.
            quantize: As for `from_pretrained`.

        Raises:
            CheckpointError: It is not a LLaVA of a known kind, or not whole.
        """
        base, adapter = checkpoint.base, checkpoint.adapter
        lacks: list[str] = []
        model = cls._load(base, dtype, mesh, seed=0, quantize=quantize, say=lacks.append)
        brought = () if adapter is None else model._add_adapter(adapter)
        if lacks and not any(path.startswith("projector.") for path in brought):
            what = f"{adapter} has no projector, nor has" if adapter else "there is no projector in"
            raise CheckpointError(
                f"{what} {format_source(base)}; name one: llm=DIR,vision=DIR,projector=FILE on the "
                "command line, LlavaModel.from_parts(llm, vision, projector) in Python"
            )
        return model

    @classmethod
    def from_parts(
        cls,
        llm: str | Path,
        vision: str | Path,
        projector: str | Path | None = None,
        dtype: str = "float32",
        seed: int = 0,
        mesh: Mesh | None = None,
    ) -> "LlavaModel":
        """Puts a LLaVA together from separate parts.

        Args:
            llm: A LlamaForCausalLM directory, or Mistral's or Qwen2's.
            vision: A CLIPVisionModel or CLIPModel directory, or SigLIP's.
            projector: Its safetensors file or directory; None makes a new one from the seed.
            dtype: The dtype of the weights and the computation.
            seed: The seed of a new projector.
            mesh: The same as in `from_pretrained`.

        Raises:
            CheckpointError: A part cannot be used.
        """
        parts = Parts(str(llm), str(vision), None if projector is None else str(projector))
        return cls._load(resolve(parts).base, dtype, mesh, seed)

    @classmethod
    def _load(
        cls,
        source: Path | Parts,
        dtype: str,
        mesh: Mesh | None,
        seed: int,
        *,
        quantize: Quantisation | None = None,
        say: Callable[[str], None] | None = None,
    ) -> "LlavaModel":
        config = read_config(source)
        graphdef, shapes = split(cls(config, ComputeConfig(dtype)))
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in shapes.items()}
        shapes |= quantised_shapes(shapes, quantize) if quantize else {}
        mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
        params = load_weights(source, config, with_shardings(shapes, mesh), seed=seed, say=say)
        model = cast("LlavaModel", merge(graphdef, params))
        model.source = source
        return model

    def load_adapter(self, path: str | Path) -> None:
        """Adds a PEFT adapter, and replaces what was trained in full beside it.

        Raises:
            CheckpointError: It is not a LoRA adapter, or not one of this model.
            ValueError: The model has an adapter already.
        """
        self._add_adapter(path)

    def _add_adapter(self, path: str | Path) -> Collection[str]:
        """As `load_adapter`; returns the parameters that it has."""
        _, params = split(self)
        if any(map(is_adapter, params)):
            raise ValueError("the model has an adapter already; merge that first")
        abstract = {p: jax.ShapeDtypeStruct(x.shape, self.dtype) for p, x in params.items()}
        adapter = open_adapter(path, self.config, abstract)
        if adapter.fingerprint and self.source:
            check_base(adapter, path, self.source, fingerprint(self.source))
        lora.add_adapters(self, adapter.adapters)
        mesh = params["llm.norm.weight"].sharding.mesh
        loaded = adapter.load(with_shardings(adapter.abstract, mesh))
        flat = [(tuple(path.split(".")), nnx.Param(value)) for path, value in loaded.items()]
        nnx.update(self, nnx.from_flat_state(flat))
        return loaded

    def merge_adapter(self) -> None:
        """Folds the adapters into the weights.

        Raises:
            ValueError: These are quantised_shapes.
        """
        lora.merge_adapters(self)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a directory that transformers reads, of any version, with what the source brought.

        What was put together from parts gets the chat template that `choose_template` finds.

        Raises:
            ValueError: There are adapters; merge them first.
        """
        _, params = split(self)
        dtype = str(self.dtype)
        save_params(params, path, self.config, dtype=dtype)
        write_model_config(self.config, path, dtype)
        if self.source and has_tokenizer(self.source):
            name = choose_template(self.source) if isinstance(self.source, Parts) else None
            template = TEMPLATES[name] if name else None
            save_processor(self.source, path, self.config, template=template)
