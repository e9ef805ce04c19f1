"""Translates between the tensor names in checkpoints and the parameter paths of this package.

Tensor names in the known formats mostly differ in their prefixes, so a layout is a table of
prefixes. Parameter paths differ from Hugging Face's names in two more ways: they have no layer
index, because all layers of a stack are in one array, and the vision layers after the feature layer
are in a separate stack, `vision.encoder.tail`.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable

from llava_jax.models.paths import MODULE_PREFIXES, NEWLINE


class LayoutError(Exception):
    """Raised if the tensor names of a checkpoint match no known layout."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A scheme of tensor names in checkpoint files.

    Attributes:
        name: Description of the scheme, for messages.
        prefixes: Maps the prefix of a parameter path to the prefix in files; the longest matching
            prefix is used.
        is_xtuner: Whether XTuner writes this layout. XTuner's prompt for Vicuna differs from
            LLaVA's prompt.
    """

    name: str
    prefixes: dict[str, str]
    is_xtuner: bool = False

    def holds(self, path: str) -> bool:
        """Returns True if files of this layout have a tensor for the parameter at `path`."""
        return any(path.startswith(ours) for ours in self.prefixes)

    def file_name(self, parameter: str) -> str:
        """Returns the name that the tensor of a parameter has in files of this layout.

        Args:
            parameter: Parameter path with the layer index, as `models.paths.unstacked` returns it.

        Raises:
            ValueError: This layout has no such parameter.
        """
        ours = max((p for p in self.prefixes if parameter.startswith(p)), key=len)
        return self.prefixes[ours] + parameter.removeprefix(ours)

    def parameter(self, file_name: str) -> str | None:
        """Returns the parameter path with the layer index for a tensor name in a file.

        The result is None for a tensor name that does not belong to this layout.
        """
        matches = [p for p in self.prefixes.items() if file_name.startswith(p[1])]
        if not matches:
            return None
        ours, theirs = max(matches, key=lambda match: len(match[1]))
        parameter = ours + file_name.removeprefix(theirs)
        is_own = _PARAMETER.match(parameter) and self.file_name(parameter) == file_name
        return parameter if is_own else None

    def parts(self, file_names: Iterable[str]) -> set[str]:
        """Returns the parts ("llm", "vision", "projector") that the tensors belong to."""
        parameters = map(self.parameter, file_names)
        return {_part(name) for name in parameters if name}

    def limited_to(self, parts: Collection[str]) -> "Layout":
        """Returns this layout, reduced to the given parts of the model."""
        kept = {ours: theirs for ours, theirs in self.prefixes.items() if _part(ours) in parts}
        return dataclasses.replace(self, prefixes=kept)


_PARAMETER = re.compile(
    r"llm\.(embed_tokens|layers|norm|lm_head)\.|llm\.image_newline$|projector\.linear_[12]\."
    r"|vision\.(embeddings|pre_layrnorm|encoder|post_layernorm|head)\."
)


def _part(path: str) -> str:
    return path.split(".", 1)[0]


def _llava(name: str, llm: str, lm_head: str, vision: str, projector: str) -> Layout:
    newline = projector.removesuffix("multi_modal_projector.") + "image_newline"
    prefixes = {"llm.": llm, "llm.lm_head.": lm_head, NEWLINE: newline}
    return Layout(name, prefixes | {"vision.": vision, "projector.": projector})


HF_4_36 = _llava(
    "Hugging Face LLaVA, names of transformers 4.36 to 4.51",
    "language_model.model.",
    "language_model.lm_head.",
    "vision_tower.vision_model.",
    "multi_modal_projector.",
)
HF_4_52 = _llava(
    "Hugging Face LLaVA in memory, names of transformers 4.52 and later",
    "model.language_model.",
    "lm_head.",
    "model.vision_tower.vision_model.",
    "model.multi_modal_projector.",
)
HF_5_MEMORY = Layout("Hugging Face LLaVA in memory, names of transformers 5", MODULE_PREFIXES)
HF_5 = _llava(
    "Hugging Face LLaVA, names of transformers 5",
    "language_model.model.",
    "language_model.lm_head.",
    "vision_tower.",
    "multi_modal_projector.",
)

_MLP = {"projector.linear_1.": "0.", "projector.linear_2.": "2."}  # names in an nn.Sequential


def _mlp(prefix: str) -> dict[str, str]:
    return {ours: prefix + theirs for ours, theirs in _MLP.items()}


LLAVA = Layout(
    "LLaVA's own code",
    {
        "llm.": "model.",
        "llm.lm_head.": "lm_head.",
        "vision.": "model.vision_tower.vision_tower.vision_model.",
        **_mlp("model.mm_projector."),
    },
)
XTUNER = Layout(
    "XTuner",
    {
        "llm.": "llm.model.",
        "llm.lm_head.": "llm.lm_head.",
        "vision.": "visual_encoder.vision_model.",
        **_mlp("projector.model."),
    },
    is_xtuner=True,
)

# Checkpoints with a single part. The tests use the name "layout J" for a model in such checkpoints.
LLAMA = Layout("Hugging Face decoder", {"llm.": "model.", "llm.lm_head.": "lm_head."})
CLIP = Layout("Hugging Face vision tower", {"vision.": "vision_model."})
CLIP_BARE = Layout("Hugging Face vision tower without prefix", {"vision.": ""})

PROJECTOR = Layout("projector without prefix", {"projector.": ""})
PROJECTOR_HF_4_36 = Layout("Hugging Face projector", {"projector.": "multi_modal_projector."})
PROJECTOR_HF_4_52 = Layout(
    "Hugging Face projector in memory", {"projector.": "model.multi_modal_projector."}
)
PROJECTOR_LLAVA = Layout("LLaVA's own projector", _mlp("model.mm_projector."))
PROJECTOR_LLAVA_SHORT = Layout("LLaVA's own projector", _mlp("mm_projector."))
PROJECTOR_LLAVA_LORA = Layout(
    "LLaVA's own parts beside LoRA",
    {
        NEWLINE: "base_model.model.model.image_newline",
        "vision.": "base_model.model.model.vision_tower.vision_tower.vision_model.",
        **_mlp("base_model.model.model.mm_projector."),
    },
)
PROJECTOR_XTUNER = Layout("XTuner's projector", _mlp("model."), is_xtuner=True)
PROJECTOR_XTUNER_LONG = Layout("XTuner's projector", _mlp("projector.model."), is_xtuner=True)

# If two layouts match equally many names, the first one is used.
LLAVA_LAYOUTS = (HF_4_36, HF_4_52, HF_5_MEMORY, HF_5, LLAVA, XTUNER)
LLM_LAYOUTS = (LLAMA, LLAVA)
VISION_LAYOUTS = (CLIP, CLIP_BARE, LLAVA)
PROJECTOR_LAYOUTS = (
    PROJECTOR_HF_4_36,
    PROJECTOR_HF_4_52,
    PROJECTOR_LLAVA,
    PROJECTOR_LLAVA_SHORT,
    PROJECTOR_LLAVA_LORA,
    PROJECTOR_XTUNER,
    PROJECTOR_XTUNER_LONG,
    PROJECTOR,
)

IGNORED = (
    r"(^|\.)position_ids$",  # buffers that old transformers versions saved
    r"\.rotary_emb\.inv_freq$",
    r"\.original_module\.",  # PEFT's copy of a module as it was before training
    r"^text_model\.",  # the half of a CLIPModel that LLaVA does not use
    r"^logit_(scale|bias)$",
    r"^(visual|text)_projection\.weight$",
)
_IGNORED = re.compile("|".join(IGNORED))


def is_ignored(file_name: str) -> bool:
    """Returns True if a tensor is not a parameter of LLaVA and can be ignored without a message."""
    return _IGNORED.search(file_name) is not None


def recognise(names: Iterable[str], layouts: Collection[Layout] = LLAVA_LAYOUTS) -> Layout:
    """Returns the layout that matches the most tensor names, limited to the parts that were found.

    Some names may be wrong or missing; a later check reports the tensors that do not fit.

    Args:
        names: All tensor names of a checkpoint.
        layouts: Layouts to choose from.

    Raises:
        LayoutError: None of `layouts` matches at least half of the names.
    """
    names = [name for name in names if not is_ignored(name)]
    explained = lambda layout: sum(layout.parameter(name) is not None for name in names)
    best = max(layouts, key=explained)
    if not names or 2 * explained(best) < len(names):
        sample = ", ".join(sorted(names)[:5]) or "none at all"
        known = "; ".join(layout.name for layout in layouts)
        raise LayoutError(
            f"the names of the {len(names)} tensors fit none of the known layouts ({known}); "
            f"the first names are: {sample}"
        )
    return best.limited_to(best.parts(names))
