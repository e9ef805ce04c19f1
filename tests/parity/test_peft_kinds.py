"""Adapters of every kind that PEFT writes: equal to PEFT's logits, merged or not, or refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from llava_jax import LlavaModel, generate
from llava_jax.conversion.convert import convert, open_source
from llava_jax.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.parity("adapters", "peft", "transformers"),
]

DECODER = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
SAVED = ["embed_tokens", "lm_head"]
EQUAL: dict[str, dict] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regular expression": {"target_modules": DECODER},
    "rslora": {"target_modules": DECODER, "use_rslora": True},
    "rank pattern": {
        "target_modules": DECODER,
        "rank_pattern": {r"layers\.[12]\.self_attn\.q_proj": 2, "down_proj": 6},
    },
    "alpha pattern": {
        "target_modules": DECODER,
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "^model.language_model.*up_proj": 5},
    },
    "both patterns, rslora": {
        "target_modules": ["q_proj", "up_proj", "linear_1"],
        "rank_pattern": {"language_model.layers.1.mlp.up_proj": 7, "linear_1": 2},
        "alpha_pattern": {"layers.2.self_attn.q_proj": 9},
        "use_rslora": True,
    },
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "layers, pattern": {
        "target_modules": ["q_proj", "down_proj", "linear_2"],
        "layers_to_transform": 1,
        "layers_pattern": ["language_model.layers"],
    },
    "excluded": {"target_modules": ["q_proj", "fc1"], "exclude_modules": r".*layers\.1\..*q_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "projector": {"target_modules": ["linear_1", "linear_2"]},
    "projector in full": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["multi_modal_projector"],
    },
    "half a projector in full": {"target_modules": ["q_proj"], "modules_to_save": ["linear_2"]},
    "norms in full": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "embedding and head in full": {"target_modules": DECODER, "modules_to_save": SAVED},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3, 40]},
    "tokens of embedding and head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [7, 1, 2]},
    },
    "gaussian": {"target_modules": DECODER, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": DECODER, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": DECODER, "init_lora_weights": "mica"},
}
SHORT = ("both patterns, rslora", "layers, pattern", "all-linear", "tokens of embedding and head")
REFUSED: dict[str, tuple[dict, str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa', .*conversion"),
    "pissa, fast": ({"init_lora_weights": "pissa_niter_2"}, "is 'pissa_niter_2'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "alora": ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens = \[5, 6\]"),
    "dora": ({"use_dora": True}, r"use_dora = True \(DoRA\)"),
    "biases": ({"bias": "all"}, r"bias = 'all'"),
    "adapter biases": ({"lora_bias": True}, "lora_bias = True"),
    "head": ({"target_modules": ["lm_head"]}, r"not supported: lm_head\.lora_a"),
    "embedding": ({"target_modules": ["embed_tokens"]}, r"embed_tokens\.lora_embedding"),
    "patches": ({"target_modules": ["patch_embedding"]}, r"patch_embedding\.lora_a"),
    "one layer in full": ({"modules_to_save": ["layers.1"]}, "of only some layers"),
}
EDITED = {  # kinds that need data or another model to be made, or that PEFT does not know yet
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication = "),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config = "),
    "qalora": ({"use_qalora": True}, "use_qalora = True"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora = "),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config = "),
    "parameters": ({"target_parameters": ["experts"]}, "target_parameters = "),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config = "),
    "new": ({"use_lora_of_next_year": True}, r"use_lora_of_next_year = True \(an unknown setting"),
    "not selected": ({"target_modules": ["k_proj"]}, r"q_proj, which PEFT would ignore"),
    "hostile": ({"target_modules": "(([a-z_.0-9])+)+!"}, "target_modules cannot be used"),
}


@pytest.fixture
def make(make_hf: Callable, tmp_path: Path) -> Callable:
    """PEFT's settings -> a model of PEFT's with random adapters, and their directory."""

    def make(settings: dict, variant: str = "gqa") -> tuple[torch.nn.Module, Path]:
        torch.manual_seed(1)
        plain = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj"]}
        base = copy.deepcopy(make_hf(variant))
        model = peft.get_peft_model(base, peft.LoraConfig(**plain | settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.normal_(std=0.2)
                elif parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return model.eval(), tmp_path / "adapter"

    return make


def ours(model: LlavaModel, batch: dict) -> np.ndarray:
    return np.asarray(model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]))


@pytest.mark.parametrize(
    "kind", [k if k in SHORT else pytest.param(k, marks=pytest.mark.slow) for k in EQUAL]
)
def test_logits_of_every_kind(
    kind, make, make_hf, saved, hf_logits, batches, assert_close, tmp_path
):
    theirs, directory = make(EQUAL[kind])
    batch = batches["padded"]
    expected = hf_logits(theirs, batch)
    assert np.abs(expected - hf_logits(make_hf("gqa"), batch)).max() > 0.05
    model = LlavaModel.from_pretrained(saved("gqa"))
    model.load_adapter(directory)
    assert_close(ours(model, batch), expected, batch)
    model.merge_adapter()
    assert_close(ours(model, batch), expected, batch)
    opened = open_source(str(directory), str(saved("gqa")), say=lambda _: None)
    convert(opened, tmp_path / "merged", "hf", merge=True)
    merged = type(make_hf("gqa")).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(hf_logits(merged.eval(), batch), expected, batch)


def test_answers_with_adapters_are_those_after_merging(make, saved, batches):
    """Generation has its own loop over the layers, whose scales differ here."""
    kinds = EQUAL["both patterns, rslora"] | EQUAL["tokens of embedding and head"]
    _, directory = make(kinds | {"target_modules": ["q_proj", "up_proj", "linear_1"]})
    model = LlavaModel.from_pretrained(saved("gqa"))
    batch = batches["two_images"]
    answer = lambda: np.asarray(
        generate(model, batch["input_ids"], batch["pixel_values"], max_new_tokens=5)
    )
    base = answer()
    model.load_adapter(directory)
    adapted = answer()
    model.merge_adapter()
    np.testing.assert_array_equal(adapted, answer())
    assert not np.array_equal(adapted, base)


def test_other_tokens_of_a_tied_head_are_refused(make, saved):
    tokens = {"embed_tokens": [5, 6], "lm_head": [8, 9]}
    _, directory = make({"trainable_token_indices": tokens}, "tied")
    with pytest.raises(CheckpointError, match="other tokens for lm_head"):
        open_source(str(directory), str(saved("tied")), say=lambda _: None)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_is_not_supported_is_refused_by_name(kind, make, saved):
    settings, message = REFUSED[kind]
    _, directory = make(settings)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(directory), str(saved("gqa")), say=lambda _: None)


def test_a_setting_that_changes_the_meaning_is_refused_by_name(make, saved):
    _, directory = make({})
    file = directory / "adapter_config.json"
    plain = json.loads(file.read_text())
    for settings, message in EDITED.values():
        file.write_text(json.dumps(plain | settings))
        with pytest.raises(CheckpointError, match=message):
            open_source(str(directory), str(saved("gqa")), say=lambda _: None)
