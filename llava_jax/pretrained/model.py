"""Builds a model from a checkpoint, and loads its weights directly onto the devices."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
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
from llava_jax.distributed.host_memory import fetch
from llava_jax.distributed.sharding import make_mesh, with_shardings
from llava_jax.errors import CheckpointError
from llava_jax.models import lora
from llava_jax.models.build import initialise, quantised_shapes
from llava_jax.models.compute import ComputeConfig
from llava_jax.models.layers import Abstract, Params, merge, split
from llava_jax.models.llava import Llava, whole_images
from llava_jax.models.paths import TRAINABLE_TOKENS, is_adapter, is_projector
from llava_jax.models.stack import jit_for_backend
from llava_jax.pretrained.adapters import check_base, open_adapter
from llava_jax.pretrained.chat_templates import choose_template
from llava_jax.pretrained.load import fingerprint, load_params
from llava_jax.pretrained.model_config import read_config, write_model_config
from llava_jax.pretrained.model_inputs import BatchMedia, kept_tokens, split_rows, to_one_row
from llava_jax.pretrained.processor import has_processor, save_processor
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
    adapters: lora.Adapters | None = None,
    say: Callable[[str], None] | None = None,
) -> Params:
    """Loads parameters from a checkpoint, and initializes parameters that the checkpoint lacks.

    Args:
        source: Directory or parts of the base, as in `Checkpoint.base`; None initializes all
            parameters.
        config: Sizes of the model.
        abstract: Shapes, dtypes and shardings of all parameters, including adapters.
        seed: Seed of new parameters: adapters, and a projector that `source` lacks.
        wanted: Paths of the parameters to return; None returns all. The checkpoint is always
            checked for all parameters.
        adapters: Adapters of the model, by the path of their module.
        say: Function that is called with a message if `source` has no projector.

    Raises:
        CheckpointError: The checkpoint cannot be read or does not fit `config`.
    """
    wanted = abstract.keys() if wanted is None else wanted
    base = {path: leaf for path, leaf in abstract.items() if not is_adapter(path)}
    params = {} if source is None else load_params(source, config, base, wanted=wanted)
    fresh = {path: abstract[path] for path in wanted if path not in params}
    if say and source is not None and any(map(is_projector, fresh)):
        say(f"{format_source(source)} has no projector; a new one is initialized with seed {seed}")
    params |= initialise(fresh, seed, adapters)
    for path, rows in (adapters or {}).items():
        own = path + TRAINABLE_TOKENS
        if own in fresh and isinstance(rows, lora.TokenRows):
            # The vectors start as those of the base. `wanted` contains the base's vectors too,
            # because new vectors are needed only at the start of a run, which loads everything.
            start = fetch(params[f"{path}.weight"])[np.array(rows.indices)].astype(fresh[own].dtype)
            params[own] = jax.device_put(start, fresh[own].sharding)
    return params


@partial(jit_for_backend, static_argnums=0)
def logits(graphdef: nnx.GraphDef, params: Params, *inputs: Any) -> jax.Array:
    """Merges a graph definition with its parameters, and calls `Llava.logits`.

    The function is compiled once for each combination of input shapes.
    """
    return Llava.logits(cast("Llava", merge(graphdef, params)), *inputs)


class LlavaModel(Llava):
    """A LLaVA model with its weights. Calling the model returns the logits of all tokens.

    Attributes:
        source: Directory or parts that the base was loaded from.
        adapter: Path of the adapter that was loaded last; None if no adapter was loaded.
    """

    source: Path | Parts | None = None
    adapter: Path | None = None

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        pixel_values: Float[ArrayLike, "I *slots C Y X"] | None = None,
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        image_sizes: Int[ArrayLike, "I 2"] | None = None,
        pixel_values_videos: Float[ArrayLike, "N F C Y X"] | None = None,
        image_sizes_videos: Int[ArrayLike, "N 2"] | None = None,
        batch_num_images: Int[ArrayLike, " S"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the logits in float32, [batch, tokens, vocabulary].

        The arguments are those that the processors of transformers return. The model is compiled
        once for each combination of input shapes. If the call is part of a function that `jax.jit`
        traces, the token ids are not known, so the number of image tokens is not checked; surplus
        image tokens then get the last feature of the images. Images that are cut into tiles, and
        videos, cannot be used there.

        Args:
            input_ids: Token ids [batch, tokens], with a token for each feature of the images:
                `config.image_tokens` for each image that is not cut into tiles.
            pixel_values: Normalized images in the order in which their image tokens appear in the
                batch, row by row: [images, channels, height, width], or [images, slots, channels,
                height, width] if images are cut into tiles; None if there are no images.
            attention_mask: 1 for tokens and 0 for padding, [batch, tokens]; None means no padding.
            image_sizes: Height and width of each image in pixels before it was resized, [images,
                2]; only needed if images are cut into tiles.
            pixel_values_videos: Normalized videos, [videos, frames, channels, height, width]; None
                if there are no videos.
            image_sizes_videos: Not used; the processors of some models return it.
            batch_num_images: Number of images of each sample that has images; see `BatchMedia`.

        Raises:
            ValueError: There are more or fewer image tokens than features of the images.
        """
        graphdef, params = split(self)
        given = (input_ids, pixel_values, attention_mask, image_sizes, pixel_values_videos)
        is_traced = lambda tree: any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))
        ids = jnp.asarray(input_ids, jnp.int32)
        mask = None if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        images = None
        if is_traced(given) and pixel_values is not None:
            if self.config.has_newline or pixel_values_videos is not None:
                raise ValueError("images with tiles and videos cannot be used inside of jax.jit")
            if not is_traced((input_ids, attention_mask)):  # only the number of images is known
                blank = np.broadcast_to(np.float32(0), np.shape(pixel_values))
                kept = kept_tokens(np.asarray(input_ids), attention_mask)
                split_rows(self.config, np.asarray(input_ids), kept, BatchMedia(blank))
            images = whole_images(self.config, ids, jnp.asarray(pixel_values))
        elif pixel_values is not None or pixel_values_videos is not None:
            kept = kept_tokens(np.asarray(input_ids), attention_mask)
            media = BatchMedia.of(pixel_values, image_sizes, pixel_values_videos, batch_num_images)
            rows = split_rows(self.config, np.asarray(input_ids), kept, media)
            images = to_one_row(self.config, rows, kept)
        if is_traced((params, given)):
            return self.logits(ids, mask, images)  # JAX forbids compiler options in a nested jit
        return logits(graphdef, params, ids, mask, images)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Parts,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        quantize: Quantisation | None = None,
    ) -> "LlavaModel":
        """Loads a model from a checkpoint.

        Args:
            path: Directory of a checkpoint or of a run, hub id, or separate parts. Parts are a
                `Parts` object or the text llm=DIR,vision=DIR,projector=FILE.
            dtype: Dtype of the weights and the computation, "float32" or "bfloat16".
            mesh: Mesh over which the weights are sharded, as `make_mesh` returns it; None uses one
                device.
            quantize: Quantization of the decoder's linear layers, "nf4", "nf4_double" or "int8";
                None keeps their weights in `dtype`.

        Raises:
            ConfigError: There is no such checkpoint, or its weights cannot be quantized.
            CheckpointError: The checkpoint is not a supported LLaVA model, is incomplete, or is
                damaged.
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
        """Loads a model from a checkpoint that `resolve` has found.

        Args:
            checkpoint: Base, and optionally an adapter checkpoint that was trained on the base.
            dtype: Dtype, as in `from_pretrained`.
            mesh: Mesh, as in `from_pretrained`.
            quantize: Quantization, as in `from_pretrained`.

        Raises:
            ConfigError: The weights cannot be quantized.
            CheckpointError: The checkpoint is not a supported LLaVA model, is incomplete, or is
                damaged.
        """
        return cls.from_checkpoints([checkpoint], dtype, mesh, quantize)[0]

    @classmethod
    def from_checkpoints(
        cls,
        checkpoints: Sequence[Checkpoint],
        dtype: str = "float32",
        mesh: Mesh | None = None,
        quantize: Quantisation | None = None,
    ) -> list["LlavaModel"]:
        """Loads checkpoints of the same base. The models share the arrays of the base.

        Args:
            checkpoints: Checkpoints with or without an adapter; the base is that of the first one.
            dtype: Dtype, as in `from_pretrained`.
            mesh: Mesh, as in `from_pretrained`.
            quantize: Quantization, as in `from_pretrained`.

        Raises:
            ConfigError: See `from_checkpoint`.
            CheckpointError: A checkpoint cannot be used.
        """
        base, models = checkpoints[0].base, []
        lacks: list[str] = []
        shared = split(cls._load(base, dtype, mesh, seed=0, quantize=quantize, say=lacks.append))
        for adapter in (one.adapter for one in checkpoints):
            model = cast("LlavaModel", merge(*shared))
            brought = () if adapter is None else model._add_adapter(adapter)
            if lacks and not any(map(is_projector, brought)):
                name = format_source(base)
                what = f"neither {adapter} nor {name} has a" if adapter else f"{name} has no"
                raise CheckpointError(
                    f"{what} projector; give its file: llm=DIR,vision=DIR,projector=FILE on the "
                    "command line, or LlavaModel.from_parts(llm, vision, projector) in Python"
                )
            models.append(model)
        return models

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
        """Builds a LLaVA from separate parts.

        Args:
            llm: Directory or hub id of a LLaMA, Mistral, Qwen2 or Qwen3 decoder.
            vision: Directory or hub id of a CLIPVisionModel, CLIPModel, SiglipVisionModel or
                SiglipModel.
            projector: Safetensors file of the projector, or a directory that contains the file;
                None initializes a new projector.
            dtype: Dtype of the weights and the computation, "float32" or "bfloat16".
            seed: Seed of a new projector.
            mesh: Mesh, as in `from_pretrained`.

        Raises:
            ConfigError: There is no such directory or hub id.
            CheckpointError: A part cannot be read, is not supported, or does not fit the other
                parts.
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
        """Adds a LoRA adapter to the model.

        If the adapter checkpoint also has parameters that were trained in full, they replace the
        parameters of the model.

        Args:
            path: Directory or file in a format of `pretrained.adapters`; pickles are refused.

        Raises:
            CheckpointError: The adapter is not supported, does not fit this model, or was trained
                on another base.
            ValueError: The model already has an adapter.
        """
        self._add_adapter(path)

    def _add_adapter(self, path: str | Path) -> Collection[str]:
        """Adds an adapter as `load_adapter` does, and returns the paths of its parameters."""
        _, params = split(self)
        if any(map(is_adapter, params)):
            raise ValueError("the model already has an adapter; call merge_adapter() first")
        path = Path(path)
        abstract = {p: jax.ShapeDtypeStruct(x.shape, self.dtype) for p, x in params.items()}
        adapter = open_adapter(path, self.config, abstract)
        if adapter.fingerprint and self.source:
            check_base(adapter, path, self.source, fingerprint(self.source))
        specs = {p: x if is_adapter(p) else abstract[p] for p, x in adapter.abstract.items()}
        loaded = adapter.load(with_shardings(specs, params["llm.norm.weight"].sharding.mesh))
        # The model is changed only now, so that an adapter that cannot be read changes nothing.
        lora.add_adapters(self, adapter.adapters)
        flat = [(tuple(path.split(".")), nnx.Param(value)) for path, value in loaded.items()]
        nnx.update(self, nnx.from_flat_state(flat))
        self.adapter = path
        return loaded

    @property
    def processor_source(self) -> Path | Parts | None:
        """Directory or parts with the tokenizer and the image processor; None if there is none.

        It is the directory of the adapter if the adapter has its own, or else the source.
        """
        has_own = self.adapter is not None and has_processor(self.adapter)
        return self.adapter if has_own else self.source

    def merge_adapter(self) -> None:
        """Merges the adapters into the weights of the model, and removes the adapters.

        Raises:
            ValueError: The weights are quantized.
        """
        lora.merge_adapters(self)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a directory that every supported version of transformers can load.

        The tokenizer and the image processor are written too, if there are any: those of the
        adapter if it has its own, or else those of the source. A model from separate parts gets the
        chat template that `choose_template` selects.

        Args:
            path: Directory to write; it is created if it does not exist.

        Raises:
            ValueError: The model has adapters; merge them first.
            CheckpointError: The tokenizer or the image processor cannot be used.
        """
        _, params = split(self)
        dtype = str(self.dtype)
        save_params(params, path, self.config, dtype=dtype)
        write_model_config(self.config, path, dtype)
        source = self.processor_source
        if source and has_tokenizer(source):
            name = choose_template(source) if isinstance(source, Parts) else None
            template = TEMPLATES[name] if name else None
            save_processor(source, path, self.config, template=template)
