"""Loads the tokenizer of a checkpoint exactly as its files define it.

The LlamaTokenizer of transformers 5 is not used. If it loads a `tokenizer.model`, it merges pieces
in the order of their ids instead of their scores; then several spaces in a row become other tokens
than in the model's training. If it loads a `tokenizer.json`, it replaces the normalizer. The
generic fast tokenizer uses the file unchanged.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from llava_jax.config import ModelConfig, Parts, format_source
from llava_jax.data.conversation import tokenizing
from llava_jax.disk import Json, copy_regular, read_regular
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.llava_directory import is_tiled, settings_of
from llava_jax.pretrained.safetensors import parse_json, read_json

IMAGE_TOKEN, VIDEO_TOKEN, PAD_TOKEN = "<image>", "<video>", "<pad>"
_FAST, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_MAX_PIECE = 1000
_SPACE = "▁"  # SentencePiece's character for a space


def has_tokenizer(source: str | Path | Parts) -> bool:
    """Returns True if a checkpoint directory, or the decoder of separate parts, has a tokenizer."""
    directory = Path(source.llm if isinstance(source, Parts) else source)
    return any((directory / name).exists() for name in (_FAST, _SENTENCEPIECE))


def has_slow_tokenizer(directory: Path) -> bool:
    """Returns True if a directory has the vocabulary file of a slow tokenizer of transformers."""
    return any((directory / name).is_file() for name in (_SENTENCEPIECE, "vocab.json"))


def load_tokenizer(source: str | Path | Parts) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint.

    Args:
        source: Directory of a LLaVA, or separate parts. With parts, the decoder's tokenizer is
            loaded; `<image>` is added if it is missing, also `<video>` if the model reads videos,
            and `<pad>` if there is no padding token.

    Raises:
        CheckpointError: There is no tokenizer, or its files cannot be read, are malformed, or are
            not safe to use.
    """
    directory = Path(source.llm if isinstance(source, Parts) else source)
    if not has_tokenizer(directory):
        raise CheckpointError(f"{directory} has neither {_FAST} nor {_SENTENCEPIECE}")
    try:
        _check_files(directory)
        with tokenizing():
            tokenizer = _load(directory)
            tokenizer.decode(tokenizer("A text, of 2 lines:\né<").input_ids)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exceptions
        said = f"{directory}: the tokenizer cannot be read: {type(error).__name__}: {error}"
        raise CheckpointError(f"{said:.1000}") from error
    if isinstance(source, Parts):
        known = tokenizer.get_vocab()
        missing = [name for name in media_tokens(settings_of(source)[1]) if name not in known]
        tokenizer.add_tokens(missing, special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def media_tokens(raw: Json) -> tuple[str, ...]:
    """Returns the tokens that stand for images and videos, in the order in which they are added.

    The order gives new tokens the same ids as in the models that llava-hf has published.

    Args:
        raw: Content of the config.json that `settings_of` returns.
    """
    if not is_tiled(raw):
        return (IMAGE_TOKEN,)
    if raw.get("mm_resampler_type") == "spatial_pool":  # LLaVA-NeXT-Video
        return (VIDEO_TOKEN, IMAGE_TOKEN)
    reads_videos = str(raw.get("image_aspect_ratio")).startswith("anyres_max")
    return (IMAGE_TOKEN, VIDEO_TOKEN) if reads_videos else (IMAGE_TOKEN,)


def image_token_of(
    tokenizer: PreTrainedTokenizerBase, config: ModelConfig, source: str | Path | Parts
) -> str:
    """Returns the text of the token that stands for an image.

    Args:
        tokenizer: Tokenizer of a model.
        config: Sizes and token ids of the model.
        source: Checkpoint that the tokenizer was loaded from, for messages.

    Raises:
        CheckpointError: The tokenizer and the model have different image tokens.
    """
    return _media_token(tokenizer, config.image_token_id, IMAGE_TOKEN, source)


def video_token_of(
    tokenizer: PreTrainedTokenizerBase, config: ModelConfig, source: str | Path | Parts
) -> str | None:
    """Returns the text of the token that stands for a video; None if the model reads no videos.

    The arguments and errors are those of `image_token_of`.
    """
    if config.video is None:
        return None
    return _media_token(tokenizer, config.video.token_id, VIDEO_TOKEN, source)


def _media_token(
    tokenizer: PreTrainedTokenizerBase, index: int, name: str, source: str | Path | Parts
) -> str:
    own = tokenizer.get_vocab().get(name)
    text = tokenizer.convert_ids_to_tokens(index)
    is_one = isinstance(text, str) and tokenizer.encode(text, add_special_tokens=False) == [index]
    if not is_one or own not in (None, index):
        raise CheckpointError(
            f"{format_source(source)}: the {name.strip('<>')} token of the model has the id "
            f"{index}, but the tokenizer has "
            f"{'no token' if own is None else f'the id {own} for'} {name}; use the model's own "
            "tokenizer"
        )
    return cast("str", text)


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: ModelConfig, source: str | Path | Parts
) -> None:
    """Checks that the model has an embedding for each token of the tokenizer.

    Args:
        tokenizer: Tokenizer of a model.
        config: Sizes of the model.
        source: Checkpoint that the tokenizer was loaded from, for messages.

    Raises:
        CheckpointError: The tokenizer has more tokens than the model.
    """
    size = config.llm.vocab_size
    ids = tokenizer.get_vocab()
    if new := sorted((name for name in ids if ids[name] >= size), key=ids.__getitem__):
        raise CheckpointError(
            f"{format_source(source)}: the tokenizer has {max(ids.values()) + 1} tokens, but the "
            f"model has {size}, so it has no embedding of, for example, {new[0]!r:.80}; add rows "
            f"to the model with transformers: model.resize_token_embeddings({len(ids)}), then "
            "model.save_pretrained, and start from that directory"
        )


def _load(directory: Path) -> PreTrainedTokenizerBase:
    if (directory / _FAST).exists():
        _check_fast(directory / _FAST)
        return PreTrainedTokenizerFast.from_pretrained(directory)
    backend = _from_sentencepiece(directory / _SENTENCEPIECE)
    loaded = PreTrainedTokenizerFast.from_pretrained(directory, tokenizer_object=backend)
    if (file := directory / "added_tokens.json").is_file():
        # Slow tokenizers find these tokens in the text as it is. transformers marks the tokens as
        # normalized, and then a fast tokenizer would match a token only with the space before it.
        added = [token for token in loaded.added_tokens_decoder.values() if token.normalized]
        names = read_json(file).keys() & {token.content for token in added}
        own = [AddedToken(name, normalized=False) for name in sorted(names)]
        loaded.backend_tokenizer.add_tokens(own)
    return loaded


_MAX_FILE_BYTES = 2**26
_MAX_LISTED = 10_000  # transformers searches the whole list once for each token in the list
_MAX_ID = 2**24


def _check_files(directory: Path) -> None:
    """Checks files that transformers opens. Malicious files could make transformers hang or crash.

    Raises:
        CheckpointError: A file is not a regular file, is too large, lists too many tokens, or does
            not contain a JSON object although it should.
    """
    settings = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    others = (_FAST, _SENTENCEPIECE, "chat_template.jinja")
    for file in [directory / name for name in (*settings, *others)] + [
        *directory.glob("additional_chat_templates/*")
    ]:
        if not file.exists():
            continue
        if not file.is_file():
            raise CheckpointError(f"{file} is not a regular file")
        if (size := file.stat().st_size) > _MAX_FILE_BYTES:
            raise CheckpointError(
                f"{file} has {size:,} bytes; a tokenizer's file may have at most "
                f"{_MAX_FILE_BYTES:,} bytes"
            )
        if file.name in settings:
            found = read_json(file)
            own = [found] if file.name == "added_tokens.json" else []
            _check_listed(file, [*own, *(found[name] for name in found if "tokens" in name)])


def _check_listed(file: Path, values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, list | dict) and len(value) > _MAX_LISTED:
            raise CheckpointError(
                f"{file} lists {len(value):,} tokens; at most {_MAX_LISTED:,} are allowed"
            )


def _check_fast(file: Path) -> None:
    """Checks the token ids in a tokenizer.json, and how much longer its steps can make a text.

    Raises:
        CheckpointError: There is no vocabulary, an id is invalid or used twice, or a step can make
            a text too long.
        Exception: The file does not have the structure of a tokenizer.json.
    """
    settings = parse_json(read_regular(file, _MAX_FILE_BYTES))
    added = [(token["content"], token["id"]) for token in settings.get("added_tokens", ())]
    _check_listed(file, [added])
    vocabulary = settings["model"]["vocab"]
    if isinstance(vocabulary, dict):  # in a list, the index of a token is its id
        added += vocabulary.items()
    if not vocabulary:
        raise CheckpointError(f"{file} has no vocabulary")
    names: dict[int, str] = {}
    for name, index in added:
        if type(index) is not int or not 0 <= index < _MAX_ID:
            raise CheckpointError(
                f"{file}: the id of {name!r:.80} is {index!r:.80}; it must be an integer from 0 to "
                f"{_MAX_ID - 1:,}"
            )
        if names.setdefault(index, name) != name:
            raise CheckpointError(
                f"{file} gives the id {index} to two tokens: {names[index]!r:.80} and {name!r:.80}"
            )
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if _growth(settings.get(part)) > _MAX_GROWTH:
            raise CheckpointError(
                f"{file}: the {part} is not supported, because it could crash or make a text more "
                f"than {_MAX_GROWTH} times as long"
            )


_MAX_GROWTH = 100
_GROWTHS = {"ByteLevel": 2, "Lowercase": 3, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18}
_INNER = ("normalizers", "pretokenizers", "processors", "decoders")


def _growth(step: Any) -> int:
    """Returns an upper bound on the factor by which a step of a tokenizer can lengthen a text.

    The factors of consecutive steps are multiplied. Without a limit, a small tokenizer file could
    therefore lengthen a text until it fills the memory.
    """
    if step is None:
        return 1
    kind = step["type"]
    if kind == "Sequence":
        inner = next(step[name] for name in _INNER if name in step)
        return math.prod(map(_growth, inner)) if len(inner) <= _MAX_GROWTH else _MAX_GROWTH + 1
    # A precompiled table can contain texts of any length. Strip with a start or stop above 1
    # triggers a bug in the tokenizers library.
    if kind == "Precompiled" or (
        kind == "Strip" and max(step.get("start", 0), step.get("stop", 0)) > 1
    ):
        return _MAX_GROWTH + 1
    if kind == "TemplateProcessing":
        ids = [len(token["ids"]) for token in step["special_tokens"].values()]
        return len(step["single"]) * max([*ids, 1])
    return max(_GROWTHS.get(kind, 1), len(step.get("content", "")), len(step.get("prepend", "")))


def copy_tokenizer(source: str | Path | Parts, directory: Path) -> None:
    """Copies a checkpoint's tokenizer files unchanged; with parts, copies the decoder's files."""
    origin = Path(source.llm if isinstance(source, Parts) else source)
    names = (_FAST, _SENTENCEPIECE, "tokenizer_config.json", "special_tokens_map.json")
    for name in (*names, "added_tokens.json", "vocab.json", "merges.txt"):
        if (origin / name).is_file():
            copy_regular(origin / name, directory / name)


def _from_sentencepiece(file: Path) -> Tokenizer:
    """Converts LLaMA's tokenizer.model to a fast tokenizer that starts each text with `<s>`."""
    try:
        import sentencepiece  # needed only without a tokenizer.json
    except ImportError as error:
        raise CheckpointError(
            f"{file.parent} has a {_SENTENCEPIECE} but no {_FAST}; reading the {_SENTENCEPIECE} "
            "needs the package sentencepiece: pip install sentencepiece"
        ) from error
    pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
    size = pieces.get_piece_size()
    names = [pieces.id_to_piece(index) for index in range(size)]
    if max(map(len, names)) > _MAX_PIECE:  # generate_merges tries all ways to split a piece
        raise CheckpointError(
            f"{file} has a piece with {max(map(len, names))} characters; at most {_MAX_PIECE} are "
            "allowed"
        )
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
