"""A checkpoint's tokenizer, exactly as its files define it.

transformers 5's LlamaTokenizer is not used: from a `tokenizer.model` it merges pieces in the order
of their ids instead of their scores, so runs of spaces come out as other tokens than the model was
trained on, and from a `tokenizer.json` it replaces the normalizer by its own. The generic fast
tokenizer takes the file at its word.
"""

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from llava_jax.config import Parts
from llava_jax.hf.tensorfile import CheckpointError

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
_FAST, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_SPACE = "▁"  # how SentencePiece writes a space


def has_tokenizer(place: str | Path | Parts) -> bool:
    """Whether a checkpoint directory, or the decoder's of separate parts, has a tokenizer."""
    directory = Path(place.llm if isinstance(place, Parts) else place)
    return any((directory / name).is_file() for name in (_FAST, _SENTENCEPIECE))


def has_slow_tokenizer(directory: Path) -> bool:
    """Whether a directory has what transformers' tokenizers in Python are made of."""
    return any((directory / name).is_file() for name in (_SENTENCEPIECE, "vocab.json"))


def load_tokenizer(place: str | Path | Parts) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Args:
        place: A LLaVA's directory. Or separate parts: then the decoder's tokenizer, with `<image>`,
            and `<pad>` if it has no padding token, added where it lacks them.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    directory = Path(place.llm if isinstance(place, Parts) else place)
    if not has_tokenizer(directory):
        raise CheckpointError(f"{directory} has neither {_FAST} nor {_SENTENCEPIECE}")
    try:
        if (directory / _FAST).is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        else:
            file = directory / _SENTENCEPIECE
            backend = _from_sentencepiece(file)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, tokenizer_object=backend)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: the tokenizer cannot be read: {error}") from error
    if isinstance(place, Parts):
        known = tokenizer.get_vocab()
        if IMAGE_TOKEN not in known:
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def copy_tokenizer(place: str | Path | Parts, directory: Path) -> None:
    """Copies a tokenizer's files as they are."""
    source = Path(place.llm if isinstance(place, Parts) else place)
    names = (_FAST, _SENTENCEPIECE, "tokenizer_config.json", "special_tokens_map.json")
    for name in (*names, "added_tokens.json", "vocab.json", "merges.txt"):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _from_sentencepiece(file: Path) -> Tokenizer:
    """LLaMA's tokenizer.model (byte-pair merges) as a fast tokenizer that starts with `<s>`."""
    try:
        import sentencepiece  # only for directories without a tokenizer.json
    except ImportError as error:
        raise CheckpointError(
            f"{file.parent} has a {_SENTENCEPIECE} but no {_FAST}; reading it takes sentencepiece "
            "(pip install sentencepiece)"
        ) from error
    pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
    size = pieces.get_piece_size()
    names = [pieces.id_to_piece(index) for index in range(size)]
    vocabulary = {name: index for index, name in enumerate(names)}
    scores = {name: pieces.get_score(index) for index, name in enumerate(names)}
    bos, unknown = names[pieces.bos_id()], names[pieces.unk_id()]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, pieces.bos_id())]
    )
    return tokenizer
