"""How checkpoints name their tensors.

Our parameters carry Hugging Face's own names, so a layout is no more than a table of prefixes.
Two things differ inside a name: ours leave the layer index out (blocks are stacked), and the vision
blocks that never reach the feature are in a stack of their own, `vision.encoder.tail`.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable


class LayoutError(Exception):
    """Tensor names that no known layout explains."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way of naming tensors.

    Attributes:
        name: Whose it is, for messages.
        prefixes: The start of the file's name by the start of ours; the longest match counts.
        is_xtuner: Whether XTuner wrote it, which has a prompt of its own.
    """

    name: str
    prefixes: dict[str, str]
    is_xtuner: bool = False

    def holds(self, path: str) -> bool:
        """Whether files of this layout have a tensor for our parameter `path`."""
        return any(path.startswith(ours) for ours in self.prefixes)

    def file_name(self, parameter: str) -> str:
        """The tensor's name in a file.

        Args:
            parameter: Our name with the layer index in it, as `unstacked` gives it.
        """
        ours = max((p for p in self.prefixes if parameter.startswith(p)), key=len)
        return self.prefixes[ours] + parameter.removeprefix(ours)

    def parameter(self, file_name: str) -> str | None:
        """The inverse of `file_name`; None for a tensor that is not of this layout."""
        matches = [p for p in self.prefixes.items() if file_name.startswith(p[1])]
        if not matches:
            return None
        ours, theirs = max(matches, key=lambda match: len(match[1]))
        parameter = ours + file_name.removeprefix(theirs)
        is_own = _PARAMETER.match(parameter) and self.file_name(parameter) == file_name
        return parameter if is_own else None

    def parts(self, file_names: Iterable[str]) -> set[str]:
        """Which of "llm", "vision" and "projector" some tensors belong to."""
        parameters = map(self.parameter, file_names)
        return {_part(name) for name in parameters if name}

    def limited_to(self, parts: Collection[str]) -> "Layout":
        """The same names, of some parts alone."""
        kept = {ours: theirs for ours, theirs in self.prefixes.items() if _part(ours) in parts}
        return dataclasses.replace(self, prefixes=kept)


_PARAMETER = re.compile(
    r"llm\.(embed_tokens|layers|norm|lm_head)\.|projector\.linear_[12]\."
    r"|vision\.(embeddings|pre_layrnorm|encoder|post_layernorm|head)\."
)


def _part(path: str) -> str:
    return path.split(".", 1)[0]


def _llava(name: str, llm: str, lm_head: str, vision: str, projector: str) -> Layout:
    prefixes = {"llm.": llm, "llm.lm_head.": lm_head, "vision.": vision, "projector.": projector}
    return Layout(name, prefixes)


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
HF_5_MEMORY = _llava(
    "Hugging Face LLaVA in memory, names of transformers 5",
    "model.language_model.",
    "lm_head.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
HF_5 = _llava(
    "Hugging Face LLaVA, names of transformers 5",
    "language_model.model.",
    "language_model.lm_head.",
    "vision_tower.",
    "multi_modal_projector.",
)

_MLP = {"projector.linear_1.": "0.", "projector.linear_2.": "2."}  # an nn.Sequential's names


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

# Layout J: every part in a place of its own.
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
PROJECTOR_XTUNER = Layout("XTuner's projector", _mlp("model."), is_xtuner=True)
PROJECTOR_XTUNER_LONG = Layout("XTuner's projector", _mlp("projector.model."), is_xtuner=True)

# Of two layouts that explain a file equally well the first is meant.
LLAVA_LAYOUTS = (HF_4_36, HF_4_52, HF_5_MEMORY, HF_5, LLAVA, XTUNER)
LLM_LAYOUTS = (LLAMA, LLAVA)
VISION_LAYOUTS = (CLIP, CLIP_BARE, LLAVA)
PROJECTOR_LAYOUTS = (
    PROJECTOR_HF_4_36,
    PROJECTOR_HF_4_52,
    PROJECTOR_LLAVA,
    PROJECTOR_LLAVA_SHORT,
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
    """Whether a tensor is not a parameter of a LLaVA, but may be ignored without a message."""
    return _IGNORED.search(file_name) is not None


def recognise(names: Iterable[str], layouts: Collection[Layout] = LLAVA_LAYOUTS) -> Layout:
    """The layout that explains most tensor names of a checkpoint, limited to the parts it has.

    Only contents count, never what files or directories are called. A damaged checkpoint is
    recognised all the same, so that its missing and foreign tensors can be named.

    Raises:
        LayoutError: None of `layouts` explains at least half of the names.
    """
    names = [name for name in names if not is_ignored(name)]
    explained = lambda layout: sum(layout.parameter(name) is not None for name in names)
    best = max(layouts, key=explained)
    if not names or 2 * explained(best) < len(names):
        sample = ", ".join(sorted(names)[:5]) or "none at all"
        known = "; ".join(layout.name for layout in layouts)
        raise LayoutError(
            f"the names of {len(names)} tensors fit none of the known layouts ({known}); "
            f"they begin with: {sample}"
        )
    return best.limited_to(best.parts(names))
