"""Generation beside transformers', token by token; and nothing depends on neighbours or devices."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import IMAGE, IMAGE_SIZE, IMAGE_TOKENS, PAD
from transformers import LlavaForConditionalGeneration
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llava_jax import LlavaModel, generate
from llava_jax.config import MeshConfig
from llava_jax.distributed.sharding import make_mesh
from llava_jax.generation.sampling import Sampling, choose, to_rows, warp
from llava_jax.models.layers import split

NEW_TOKENS = 128


def prompts(images: tuple[int, ...], side: str = "left") -> dict[str, np.ndarray]:
    """A padded batch whose rows have so many images each, and texts of different lengths."""
    rng = np.random.default_rng(len(images))
    rows = []
    for index, count in enumerate(images):
        row = rng.integers(1, IMAGE, 3 + index).tolist()
        for _ in range(count):
            row += [IMAGE] * IMAGE_TOKENS + rng.integers(1, IMAGE, 2).tolist()
        rows.append(row)
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), PAD), np.zeros((len(rows), longest), np.int32)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    pixels = rng.standard_normal((sum(images), 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def theirs(model: LlavaForConditionalGeneration, batch: dict, new: int, **settings) -> np.ndarray:
    tensors = {name: torch.from_numpy(value) for name, value in batch.items() if len(value)}
    tokens = model.generate(
        **tensors, max_new_tokens=new, do_sample=False, pad_token_id=PAD, **settings
    )
    return tokens[:, batch["input_ids"].shape[1] :].numpy()


@pytest.fixture(scope="module")
def ours(saved: Callable[[str], Path]) -> Callable[[str], LlavaModel]:
    return lambda variant: LlavaModel.from_pretrained(saved(variant))


VARIANTS = [
    *("gqa", "qwen3"),
    *(pytest.param(v, marks=pytest.mark.slow) for v in ("mha", "tied", "llama3_rope", "qwen2")),
    pytest.param("siglip", marks=pytest.mark.slow),
]
BATCHES = {
    "none": (0,),
    "one": (1,),
    "two": (2,),
    "mixed": (1, 0, 2, 1, 0, 2, 1, 1),  # has rows of all others
}


@pytest.mark.parity("generation", "transformers")
@pytest.mark.parametrize(
    "images",
    [
        pytest.param(images, id=name, marks=[pytest.mark.slow] if name != "mixed" else [])
        for name, images in BATCHES.items()
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_the_same(
    variant: str,
    images: tuple[int, ...],
    make_hf: Callable,
    ours: Callable,
    assert_parity: Callable,
):
    batch = prompts(images)
    expected = theirs(make_hf(variant), batch, NEW_TOKENS, eos_token_id=None)
    given = generate(ours(variant), **batch, max_new_tokens=NEW_TOKENS, eos_token_id=())
    assert given.shape == expected.shape == (len(images), NEW_TOKENS)
    varied = len(set(given.ravel().tolist())) > 5
    assert varied or variant != "gqa"  # others, random as they are, repeat themselves
    assert_parity(f"tokens that differ, of {given.size}", int((given != expected).sum()), 0)


def test_a_row_is_what_it_is_alone_on_whichever_side_it_is_padded(ours: Callable):
    images, model = BATCHES["mixed"], ours("gqa")
    batch = prompts(images)
    together = generate(model, **batch, max_new_tokens=16)
    right = generate(model, **prompts(images, "right"), max_new_tokens=16)
    np.testing.assert_array_equal(right, together)
    first = 0
    for row, count in enumerate(images):
        kept = batch["attention_mask"][row] > 0
        pixels = batch["pixel_values"][first : first + count]
        alone = generate(model, batch["input_ids"][row : row + 1, kept], pixels, max_new_tokens=16)
        np.testing.assert_array_equal(alone[0], together[row])
        first += count


def test_it_ends_where_transformers_ends(make_hf: Callable, ours: Callable):
    batch = prompts(BATCHES["mixed"])
    free = generate(ours("gqa"), **batch, max_new_tokens=32, eos_token_id=())
    ends = [int(free[0, 3]), int(free[3, 9])]
    expected = theirs(make_hf("gqa"), batch, 32, eos_token_id=ends)
    given = generate(ours("gqa"), **batch, max_new_tokens=32, eos_token_id=ends)
    np.testing.assert_array_equal(given, expected)
    assert PAD in given


def test_repetition_is_penalised_alike(make_hf: Callable, ours: Callable):
    batch = prompts((1, 0))
    expected = theirs(make_hf("gqa"), batch, 32, eos_token_id=None, repetition_penalty=1.3)
    settings = {"max_new_tokens": 32, "eos_token_id": ()}
    given = generate(ours("gqa"), **batch, **settings, repetition_penalty=1.3)
    np.testing.assert_array_equal(given, expected)
    assert (given != generate(ours("gqa"), **batch, **settings)).any()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=0.9, top_k=20, top_p=0.5),
        Sampling(temperature=2.0, top_k=1000, top_p=1e-6),
    ],
)
def test_what_is_drawn_from_is_the_same(sampling: Sampling):
    logits = np.random.default_rng(0).normal(0, 3, (4, 64)).astype(np.float32)
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    expected = torch.from_numpy(logits.copy())
    for warper in warpers:
        expected = warper(None, expected)
    given = warp(jnp.array(logits), to_rows([sampling] * 4))
    np.testing.assert_allclose(given, expected.numpy(), rtol=1e-6)


def test_draws_follow_the_chances_and_the_seed_alone():
    rng = np.random.default_rng(0)
    logits, count = rng.normal(0, 1, 8).astype(np.float32), 4000
    rows = to_rows([Sampling(temperature=1.0, seed=seed) for seed in range(count)])
    seen, places = jnp.zeros((count, 8), bool), jnp.full(count, 5)
    logits = jnp.tile(logits, (count, 1))
    drawn = np.asarray(jax.jit(choose)(logits, seen, places, rows))
    shares = np.bincount(drawn, minlength=8) / count
    chances = np.asarray(jax.nn.softmax(logits[0]))
    assert np.abs(shares - chances).max() < 4 * np.sqrt(0.25 / count)
    few = slice(10, 13)
    again = jax.jit(choose)(
        logits[few], seen[few], places[few], jax.tree.map(lambda x: x[few], rows)
    )
    np.testing.assert_array_equal(again, drawn[few])


def test_greedy_rows_stay_greedy_beside_drawn_ones(ours: Callable):
    batch = prompts((1, 0))
    model = ours("gqa")
    greedy = generate(model, **batch, max_new_tokens=16)
    drawn = generate(model, **batch, max_new_tokens=16, temperature=1.0, seed=3)
    assert (drawn != greedy).any()
    np.testing.assert_array_equal(
        drawn, generate(model, **batch, max_new_tokens=16, temperature=1.0, seed=3)
    )
    one = generate(model, **batch, max_new_tokens=16, temperature=1.0, top_k=1)
    np.testing.assert_array_equal(one, greedy)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, fsdp=2, tensor=2),
        pytest.param(MeshConfig(fsdp=1, tensor=-1), marks=pytest.mark.slow),
        pytest.param(MeshConfig(), marks=pytest.mark.slow),
    ],
)
def test_devices_change_nothing(mesh: MeshConfig, saved: Callable[[str], Path]):
    batch = prompts((1, 0, 2))
    expected = generate(LlavaModel.from_pretrained(saved("mha")), **batch, max_new_tokens=16)
    model = LlavaModel.from_pretrained(saved("mha"), mesh=make_mesh(mesh))
    assert len(split(model)[1]["llm.layers.mlp.up_proj.weight"].sharding.device_set) == 8
    np.testing.assert_array_equal(generate(model, **batch, max_new_tokens=16), expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_says_what_its_logits_say(kind: str, saved: Callable[[str], Path]):
    model = LlavaModel.from_pretrained(saved("wide"), quantize=kind)
    batch = prompts((1,))
    given = generate(model, **batch, max_new_tokens=6)
    tokens = np.concatenate([batch["input_ids"], given], axis=1)  # one pass tells them all
    logits = model(tokens, batch["pixel_values"])
    np.testing.assert_array_equal(given, logits[:, -7:-1].argmax(-1))


def test_bfloat16_generates(saved: Callable[[str], Path]):
    model = LlavaModel.from_pretrained(saved("gqa"), dtype="bfloat16")
    assert generate(model, **prompts((1, 0)), max_new_tokens=4).shape == (2, 4)


def test_images_that_do_not_fit_are_refused(ours: Callable):
    batch = prompts((1, 0))
    with pytest.raises(ValueError, match="has 4 image tokens, but its 0 images need 0"):
        generate(ours("gqa"), batch["input_ids"], None, batch["attention_mask"])
    batch["input_ids"][0, -1] = IMAGE
    with pytest.raises(ValueError, match=r"row 0 .* has 5 image tokens, but its 1 images need 4"):
        generate(ours("gqa"), **batch)
