"""A limit of tokens beyond the decoder's context is warned of, unless its RoPE is scaled for it."""

import dataclasses

import pytest

from llava_jax.config import LlmConfig, RopeScaling
from llava_jax.training.setup import context_warnings

LLAMA3 = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    ("trained", "scaling", "context"),
    [
        (4096, None, 4096),
        (4096, RopeScaling("linear", 4.0), 16384),
        (4096, RopeScaling("dynamic", 2.0), 8192),
        (32768, RopeScaling("yarn", 4.0, 32768), 131072),
        (131072, RopeScaling("yarn", 4.0, 32768), 131072),
        (131072, LLAMA3, 131072),
    ],
)
def test_longer_samples_than_the_context_are_warned_of(trained, scaling, context):
    llm = LlmConfig(max_position_embeddings=trained, rope_scaling=scaling)
    assert llm.context_length == context
    assert not list(context_warnings(context, llm))
    (line,) = context_warnings(context + 1, llm)
    assert (
        f"data.max_length is {context + 1}, but the decoder is made for at most {context}" in line
    )


def test_the_change_that_the_warning_names_is_enough():
    llm = LlmConfig(max_position_embeddings=4096)
    (line,) = context_warnings(32000, llm)
    assert (
        'set "rope_scaling": {"rope_type": "yarn", "factor": 8.0, '
        '"original_max_position_embeddings": 4096} in the decoder\'s settings in config.json'
    ) in line
    scaled = dataclasses.replace(llm, rope_scaling=RopeScaling("yarn", 8.0, 4096))
    assert not list(context_warnings(32000, scaled))
    (line,) = context_warnings(40000, scaled)
    assert 'give the "rope_scaling" a larger factor' in line
