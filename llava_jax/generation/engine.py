"""Generates with continuous batching: one compiled step adds a token to every running sequence.

Every sequence has one row in preallocated caches. Each prompt is processed alone, so the generated
tokens do not depend on the other sequences. When a sequence has ended, its row takes a new prompt
while the other sequences continue.
"""

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import ArrayLike, Bool, Float, Int, Int32

from llava_jax.distributed.sharding import to_spec
from llava_jax.errors import ConfigError, SampleError
from llava_jax.generation.decoder import (
    Cache,
    Structure,
    Weights,
    cache_shape,
    decode,
    prefill,
    unstack_layers,
)
from llava_jax.generation.sampling import GREEDY, Rows, Sampling, Scores, choose, score, to_rows
from llava_jax.models.llava import ImageInputs, Llava
from llava_jax.models.stack import jit_for_backend
from llava_jax.pretrained.model import LlavaModel
from llava_jax.pretrained.model_inputs import (
    BatchMedia,
    RowInputs,
    kept_tokens,
    padded_images,
    split_rows,
)
from llava_jax.pretrained.processor import end_tokens

MIN_PADDED = 32
"""Smallest padded length of a prompt. Larger padded lengths are 2^n and 1.5 * 2^n."""


class Likely(NamedTuple):
    """Log probability of a generated token, and of the tokens that were most likely in its place.

    Attributes:
        logprob: Log probability of the generated token.
        alternatives: Ids and log probabilities of the most likely tokens, most likely first.
    """

    logprob: float
    alternatives: list[tuple[int, float]]


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, and the tokens that were generated for the prompt so far.

    Attributes:
        prompt: Token ids, images, and the tokens that the features of the images replace.
        max_new_tokens: Largest number of tokens to generate.
        ends: Ids of the tokens that end the sequence.
        sampling: Settings by which tokens are chosen.
        scores: Log probabilities of the generated tokens; None if they are not wanted.
        tokens: Generated tokens, including the token that ended the sequence.
        ending: "stop" if a token of `ends` ended the sequence, "length" if the sequence reached its
            largest length, None while the sequence is running.
    """

    prompt: RowInputs
    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    sampling: Sampling = GREEDY
    scores: list[Likely] | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    ending: Literal["stop", "length"] | None = None

    @property
    def input_ids(self) -> Int32[np.ndarray, " T"]:
        """Token ids of the prompt, with a token for each feature of its images."""
        return self.prompt.input_ids


class Engine:
    """A model that generates answers to several prompts at the same time.

    Args:
        model: Model with its weights, which may be quantized, have adapters, and be sharded.
        slots: Largest number of sequences at the same time.
        length: Largest number of tokens of a sequence, prompt and answer together.
        donate: Whether to move the weights out of the model. If True, the model cannot be used
            afterwards. If False, the weights of the decoder's blocks are in memory twice.
        unstacked: Result of `unstack_layers` for the model; None computes it.

    Raises:
        ConfigError: The decoder has a sliding window that is shorter than `length`.
    """

    def __init__(
        self,
        model: Llava,
        *,
        slots: int,
        length: int,
        donate: bool = False,
        unstacked: tuple[Structure, Weights] | None = None,
    ):
        self.config = model.config
        self.length = length
        window = model.config.llm.sliding_window
        if window is not None and length > window:
            raise ConfigError(
                f"the length of {length} tokens is above the decoder's sliding_window of {window} "
                f"tokens, which is not supported; choose a length of at most {window}"
            )
        self._dtype, self._slots = model.dtype, slots
        unstacked = unstacked or unstack_layers([model], donate=donate)[0]
        self._structure, self._weights = unstacked
        self._compiled: set[tuple[int, int]] = set()
        self._compiling = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Removes all sequences and makes new caches.

        This is needed after an error or an interruption in `add` or `step`, because these methods
        donate the caches to a compiled function.
        """
        sharding = jax.tree.leaves(self._weights.layers)[0].sharding
        shape = cache_shape(self.config.llm, self._slots, self.length)
        whole = sharding
        if isinstance(sharding, NamedSharding):
            # Heads are sharded like the outputs of k_proj and v_proj, which compute them.
            axes = ("whole", "split_outputs", "whole", "whole")
            whole = NamedSharding(sharding.mesh, PartitionSpec())
            sharding = NamedSharding(sharding.mesh, to_spec(axes, shape, sharding.mesh.shape))
        empty = lambda: jnp.zeros(shape, self._dtype, device=sharding)
        self._caches = [Cache(empty(), empty()) for _ in self._weights.layers]
        self._seen = jnp.zeros((self._slots, self.config.llm.vocab_size), bool, device=whole)
        self._rows: list[Request | None] = [None] * self._slots

    @property
    def free(self) -> int:
        """Returns the number of sequences that can be added."""
        return self._rows.count(None)

    def check(self, length: int) -> None:
        """Checks that a prompt is not empty and leaves room for an answer.

        Args:
            length: Number of tokens of the prompt, with images expanded.

        Raises:
            SampleError: The prompt is empty or too long.
        """
        if not 0 < length < self.length:
            raise SampleError(
                f"the prompt has {length} tokens; it must have at least 1 token, and prompt and "
                f"answer together may have at most {self.length}",
                "length",
            )

    def is_compiled(self, request: Request) -> bool:
        """Returns True if the function that `add` needs for this request is compiled."""
        return self._size(request) in self._compiled

    def compile(self, request: Request) -> None:
        """Compiles the function that processes a prompt of this size, if needed.

        Any thread may call this method while another thread generates.
        """
        if self.is_compiled(request):
            return
        with self._compiling:
            if self.is_compiled(request):
                return
            shape_of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            caches, seen = jax.tree.map(shape_of, (self._caches, self._seen))
            _start.compile(self._structure, self._weights, caches, seen, *self._inputs(request, 0))
            self._compiled.add(self._size(request))

    def add(self, request: Request) -> None:
        """Processes a prompt and generates its first token.

        Raises:
            SampleError: The prompt is empty or too long.
            ValueError: No slot is free.
        """
        self.check(len(request.input_ids))
        self.compile(request)
        row = self._rows.index(None)
        token, scores, self._caches, self._seen = _start(
            self._structure,
            self._weights,
            self._caches,
            self._seen,
            *self._inputs(request, row),
        )
        self._rows[row] = request
        self._take([(0, request)], token, scores)

    def _size(self, request: Request) -> tuple[int, int]:
        """Returns the padded numbers of tokens and of image slots, which select a program."""
        image_slots = len(request.prompt.pixel_values)
        length = _padded(len(request.input_ids), self.length)
        return length, _padded_image_slots(image_slots)

    def _inputs(self, request: Request, row: int) -> tuple[Any, ...]:
        """Returns the arguments of `_start` that depend on the request."""
        size, image_slots = self._size(request)
        input_ids = np.full(size, self.config.pad_token_id, np.int32)
        input_ids[: len(request.input_ids)] = request.input_ids
        return (
            input_ids,
            np.int32(len(request.input_ids)),
            padded_images(request.prompt, size, image_slots) if image_slots else None,
            np.int32(row),
            to_rows([request.sampling]),
            np.bool_(request.scores is not None),
        )

    def step(self) -> list[Request]:
        """Generates one token for every running sequence, and returns these sequences."""
        running = [(row, request) for row, request in enumerate(self._rows) if request is not None]
        if not running:
            return []
        newest = [0 if request is None else request.tokens[-1] for request in self._rows]
        tokens, scores, self._caches, self._seen = _advance(
            self._structure,
            self._weights,
            self._caches,
            self._seen,
            np.array(newest, np.int32),
            np.array([_length(request) - 1 for request in self._rows], np.int32),
            to_rows([GREEDY if r is None else r.sampling for r in self._rows]),
            np.bool_(any(request.scores is not None for _, request in running)),
        )
        self._take(running, tokens, scores)
        return [request for _, request in running]

    def remove(self, request: Request) -> None:
        """Stops a sequence before its end; does nothing if the sequence is not running."""
        if request in self._rows:
            self._rows[self._rows.index(request)] = None

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Adds requests whenever slots are free, and yields each request when it has ended."""
        waiting = iter(requests)
        exhausted = False
        while True:
            while self.free and not exhausted:
                if (request := next(waiting, None)) is None:
                    exhausted = True
                    break
                self.add(request)
                if request.ending:
                    yield request
            running = self.step()
            if exhausted and not running:
                return
            yield from (request for request in running if request.ending)

    def _take(
        self, running: Sequence[tuple[int, Request]], tokens: jax.Array, scores: Scores
    ) -> None:
        """Adds new tokens to sequences, and frees the rows of the sequences that have ended.

        Args:
            running: Request of each sequence, with the index of its token in `tokens`.
            tokens: New tokens.
            scores: Log probabilities of the new tokens.
        """
        found = np.asarray(tokens).tolist()
        wanted = any(request.scores is not None for _, request in running)
        chosen, ids, others = (np.asarray(x).tolist() if wanted else [] for x in scores)
        for index, request in running:
            token = found[index]
            request.tokens.append(token)
            if request.scores is not None:
                pairs = zip(ids[index], others[index], strict=True)
                request.scores.append(Likely(chosen[index], [*pairs]))
            if token in request.ends:
                request.ending = "stop"
            elif len(request.tokens) >= request.max_new_tokens or _length(request) >= self.length:
                request.ending = "length"
            if request.ending:
                self.remove(request)


def _length(request: Request | None) -> int:
    """Returns the number of tokens of prompt and answer; 1 for a row that is free."""
    return 1 if request is None else len(request.input_ids) + len(request.tokens)


def _padded(length: int, most: int) -> int:
    """Rounds a prompt's length up to one of few lengths, so that few programs are compiled."""
    size = MIN_PADDED
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, most)


_EXACT_SLOTS, _SLOT_STEP = 5, 4
"""Up to `_EXACT_SLOTS` image slots, each number has its own program; larger numbers are rounded up
to the next multiple of `_SLOT_STEP`."""


def _padded_image_slots(count: int) -> int:
    """Rounds a number of image slots up to one of few numbers, so that few programs exist."""
    return count if count <= _EXACT_SLOTS else -(-count // _SLOT_STEP) * _SLOT_STEP


def _start_fn(
    structure: Structure,
    weights: Weights,
    caches: list[Cache],
    seen: Bool[jax.Array, "B V"],
    input_ids: Int[jax.Array, "T"],
    length: Int[jax.Array, ""],
    images: ImageInputs | None,
    row: Int[jax.Array, ""],
    rows: Rows,
    wants_scores: Bool[jax.Array, ""],
) -> tuple[Int[jax.Array, "1"], Scores, list[Cache], Bool[jax.Array, "B V"]]:
    """Processes a prompt in one row of the caches, and chooses the first token of the answer."""
    logits, caches = prefill(structure, weights, caches, input_ids, length, images, row)
    is_prompt = jnp.arange(input_ids.shape[0]) < length
    mine = jnp.zeros(seen.shape[1], bool).at[input_ids].max(is_prompt)
    seen = jax.lax.dynamic_update_slice(seen, mine[None], (row, 0))
    token = choose(logits, mine[None], length[None], rows)
    return token, score(logits, token, wants_scores), caches, seen


def _advance_fn(
    structure: Structure,
    weights: Weights,
    caches: list[Cache],
    seen: Bool[jax.Array, "B V"],
    tokens: Int[jax.Array, "B"],
    positions: Int[jax.Array, "B"],
    rows: Rows,
    wants_scores: Bool[jax.Array, ""],
) -> tuple[Int[jax.Array, "B"], Scores, list[Cache], Bool[jax.Array, "B V"]]:
    """Processes the newest token of every row, and chooses the next tokens."""
    logits, caches = decode(structure, weights, caches, tokens, positions)
    seen = seen.at[jnp.arange(len(tokens)), tokens].set(True)
    tokens = choose(logits, seen, positions + 1, rows)
    return tokens, score(logits, tokens, wants_scores), caches, seen


_start = jit_for_backend(_start_fn, static_argnums=0, donate_argnums=(2, 3))
_advance = jit_for_backend(_advance_fn, static_argnums=0, donate_argnums=(2, 3))


def generate(
    model: LlavaModel,
    input_ids: Int[ArrayLike, "B T"],
    pixel_values: Float[ArrayLike, "I *slots C Y X"] | None = None,
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    *,
    image_sizes: Int[ArrayLike, "I 2"] | None = None,
    pixel_values_videos: Float[ArrayLike, "N F C Y X"] | None = None,
    image_sizes_videos: Int[ArrayLike, "N 2"] | None = None,
    batch_num_images: Int[ArrayLike, " S"] | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
) -> Int32[np.ndarray, "B new"]:
    """Generates an answer to each prompt of a batch. The answers do not depend on each other.

    Args:
        model: Model with its weights. During the call, the weights of the decoder's blocks are in
            memory twice.
        input_ids: Token ids of the prompts, with a token for each feature of the images.
        pixel_values: Images of all prompts in the order of their tokens, as in `LlavaModel`; None
            if there are none.
        attention_mask: 1 for tokens and 0 for padding, which may be on either side; None means that
            there is no padding.
        max_new_tokens: Largest number of tokens to generate for a prompt.
        temperature: Divisor of the logits; 0 chooses the most likely token.
        image_sizes: Height and width of each image in pixels before it was resized, as in
            `LlavaModel`; only needed if images are cut into tiles.
        pixel_values_videos: Videos of all prompts, as in `LlavaModel`; None if there are none.
        image_sizes_videos: Not used; the processors of some models return it.
        batch_num_images: Number of images of each prompt that has images, as in `LlavaModel`.
        top_k: Number of most likely tokens to sample from; None samples from all tokens.
        top_p: Total probability of the most likely tokens to sample from.
        repetition_penalty: Factor by which the logits of tokens that are already in the prompt or
            the answer are made smaller, as in Hugging Face's generation; 1 changes nothing.
        seed: Random seed of the first prompt; the prompt with index n has the seed `seed + n`.
        eos_token_id: Ids of the tokens that end an answer; None takes the ids in the checkpoint.

    Returns:
        The new tokens, including the token that ends an answer, padded on the right with
        `config.pad_token_id`.

    Raises:
        ConfigError: A setting has a value that is not allowed, or the decoder does not support
            sequences of this length.
        SampleError: A prompt is empty.
        ValueError: The number of images does not match the number of image tokens.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: the value must be at least 1")
    if eos_token_id is None:
        ends = end_tokens(model.source) if model.source else frozenset()
    else:
        ends = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    ids = np.asarray(input_ids)
    media = BatchMedia.of(pixel_values, image_sizes, pixel_values_videos, batch_num_images)
    rows = split_rows(model.config, ids, kept_tokens(ids, attention_mask), media)
    requests = [Request(row, max_new_tokens, ends) for row in rows]
    for number, request in enumerate(requests):
        row_seed = (seed + number) % 2**32
        request.sampling = Sampling(temperature, top_k, top_p, repetition_penalty, row_seed)
    longest = max((len(request.input_ids) for request in requests), default=1)
    length = _padded(longest + max_new_tokens, 2**30)
    engine = Engine(model, slots=len(requests), length=length)
    for _ in engine.run(requests):
        pass
    new = max((len(request.tokens) for request in requests), default=0)
    tokens = np.full((len(requests), new), model.config.pad_token_id, np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: len(request.tokens)] = request.tokens
    return tokens
