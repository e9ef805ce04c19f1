"""Decoders with a scaled RoPE compute what transformers computes, beyond the original context."""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import FAMILIES, PAD, ROPE_SCALINGS
from transformers import LlamaConfig, LlavaForConditionalGeneration
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_jax import LlavaModel, generate
from llava_jax.config import LlmConfig, RopeScaling
from llava_jax.models.layers import merge
from llava_jax.models.llava import head_logits
from llava_jax.models.rope import attention_factor, rope_frequencies

CONTEXT = 32
"""The models' max_position_embeddings."""

ONCE = [*zip(itertools.cycle(FAMILIES), ROPE_SCALINGS, strict=False)]
"""Every family and every scaling at least once."""

CASES = [
    pytest.param(*case, marks=[] if case in ONCE else pytest.mark.slow)
    for case in itertools.product(FAMILIES, ROPE_SCALINGS)
]


@partial(jax.jit, static_argnums=0)
def logits_of_rows(graphdef, params, ids, segment_ids):
    model = merge(graphdef, params)
    return head_logits(model.llm(model.embed(ids, None), segment_ids), model.llm.head)


def forget(model: LlavaForConditionalGeneration) -> None:
    """Lets "dynamic" forget the longest sequence that the model has seen."""
    with torch.no_grad():
        model(input_ids=torch.ones((1, 1), dtype=torch.long))


@pytest.mark.parity("checkpoints", "transformers")
@pytest.mark.parametrize(("family", "scaling"), CASES)
def test_packed_samples_are_each_computed_as_by_transformers_alone(
    family: str,
    scaling: str,
    make_hf: Callable,
    saved: Callable,
    load: Callable,
    hf_logits: Callable,
    assert_parity: Callable,
):
    """Also a sample that is shorter than the context, beside one of three contexts."""
    name = f"{family} {scaling}"
    graphdef, params, config = load(saved(name))
    assert config.llm.rope_scaling is not None
    lengths = (3 * CONTEXT, CONTEXT - 2, CONTEXT + 9)
    rng = np.random.default_rng(0)
    samples = [rng.integers(3, 60, (1, length)) for length in lengths]
    padding = np.full((1, 5), PAD)
    ids = jnp.asarray(np.concatenate([*samples, padding], axis=1), jnp.int32)
    segments = np.repeat(np.array([1, 2, 3, 0], np.int32), (*lengths, 5))[None]
    ours = np.asarray(logits_of_rows(graphdef, params, ids, segments))
    start, worst = 0, 0.0
    for sample in samples:
        forget(make_hf(name))
        theirs = hf_logits(make_hf(name), {"input_ids": sample})[0]
        here = ours[0, start : start + len(theirs)]
        worst = max(worst, np.abs(here - theirs).max() / np.abs(theirs).max())
        start += len(theirs)
    assert_parity("logits, of the largest", worst, 2e-5, case=name)


@pytest.mark.parity("generation", "transformers")
@pytest.mark.parametrize(
    ("family", "scaling"),
    [("llama", "dynamic"), pytest.param("qwen2", "yarn", marks=pytest.mark.slow)],
)
def test_greedy_tokens_beyond_the_context_are_the_same(
    family: str, scaling: str, make_hf: Callable, saved: Callable, assert_parity: Callable
):
    """Prompts that are shorter and longer than the context, together and each alone."""
    name, new = f"{family} {scaling}", CONTEXT
    rng = np.random.default_rng(1)
    lengths = (CONTEXT - 12, CONTEXT + 20)
    ids, mask = np.full((2, lengths[1]), PAD), np.zeros((2, lengths[1]), np.int32)
    expected = []
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = rng.integers(3, 60, length), 1
        forget(make_hf(name))
        prompt = torch.from_numpy(ids[row : row + 1, -length:])
        tokens = make_hf(name).generate(
            prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=PAD
        )
        expected.append(tokens[0, length:].numpy())
    model = LlavaModel.from_pretrained(saved(name))
    given = generate(model, input_ids=ids, attention_mask=mask, max_new_tokens=new, eos_token_id=())
    differ = int((given != np.stack(expected)).sum())
    assert_parity(f"tokens that differ, of {given.size}", differ, 0, case=name)


@pytest.mark.parametrize("scaling", [name for name in ROPE_SCALINGS if name != "dynamic"])
def test_frequencies_are_those_of_transformers(scaling: str):
    """At the sizes of released models, to the last bit but one."""
    fields = ROPE_SCALINGS[scaling] | {"original_max_position_embeddings": 4096}
    kind = scaling.partition(",")[0]
    size, theta = 128, 1e6
    parameters = {"rope_type": kind, "rope_theta": theta, **fields}
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](
        LlamaConfig(head_dim=size, rope_parameters=parameters), torch.device("cpu")
    )
    config = LlmConfig(head_dim=size, rope_theta=theta, rope_scaling=RopeScaling(kind, **fields))
    np.testing.assert_allclose(rope_frequencies(config), theirs.numpy(), rtol=2.5e-7)
    assert attention_factor(config.rope_scaling) == pytest.approx(factor, rel=1e-12)
