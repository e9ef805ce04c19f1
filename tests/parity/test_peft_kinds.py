"""Adapters of every kind that PEFT writes: equal to PEFT's logits, merged or not, or refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from llava_jax import LlavaModel, generate
from llava_jax.conversion.convert import convert, open_source
from llava_jax.errors import CheckpointError
from llava_jax.models.layers import split
from llava_jax.models.lora import adapters_in, count_values
from llava_jax.models.paths import LLM, is_adapter

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
    "whole names beside layers": {
        "target_modules": ["q_proj", "model.language_model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
    },
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
TIED: dict[str, dict] = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3, 40]},
    "embedding in full": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
SHORT = (
    *("both patterns, rslora", "layers, pattern", "all-linear", "tokens of embedding and head"),
    "whole names beside layers",
)
REFUSED: dict[str, tuple[dict, str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa', .*merge_and_unload"),
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
    ("kind", "variant"),
    [
        *(
            (kind, "gqa") if kind in SHORT else pytest.param(kind, "gqa", marks=pytest.mark.slow)
            for kind in EQUAL
        ),
        *((kind, "tied") for kind in TIED),
    ],
)
def test_logits_of_every_kind(
    kind, variant, make, make_hf, saved, hf_logits, batches, assert_close, tmp_path
):
    theirs, directory = make((EQUAL if variant == "gqa" else TIED)[kind], variant)
    batch = batches["padded"]
    expected = hf_logits(theirs, batch)
    assert np.abs(expected - hf_logits(make_hf(variant), batch)).max() > 0.05
    model = LlavaModel.from_pretrained(saved(variant))
    model.load_adapter(directory)
    assert_close(ours(model, batch), expected, batch)
    model.merge_adapter()
    assert_close(ours(model, batch), expected, batch)
    opened = open_source(str(directory), str(saved(variant)), say=lambda _: None)
    convert(opened, tmp_path / "merged", "hf", merge=True)
    merged = type(make_hf(variant)).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(hf_logits(merged.eval(), batch), expected, batch)


def test_eva_is_a_plain_adapter_once_it_is_stored(make, saved, batches, hf_logits, assert_close):
    """PEFT computes its first values from data, which only training has."""
    theirs, directory = make({"target_modules": DECODER})
    file = directory / "adapter_config.json"
    settings = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    model = LlavaModel.from_pretrained(saved("gqa"))
    model.load_adapter(directory)
    assert_close(
        ours(model, batches["padded"]), hf_logits(theirs, batches["padded"]), batches["padded"]
    )


def test_all_linear_in_a_file_means_all_linear_layers(make, saved):
    """PEFT writes the names instead, but takes the word as well."""
    _, directory = make({"target_modules": "all-linear"})
    file = directory / "adapter_config.json"
    found = []
    for word in (None, "all-linear", "All-Linear"):
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | ({"target_modules": word} if word else {})))
        opened = open_source(str(directory), str(saved("gqa")), say=lambda _: None)
        found.append(opened.adapters)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], SAVED])
def test_a_copy_of_a_tied_matrix_is_refused(modules, make, saved):
    _, directory = make({"modules_to_save": modules}, "tied")
    message = f"modules_to_save contains {' and '.join(modules)}, but .* only with ensure_weight"
    with pytest.raises(CheckpointError, match=message):
        open_source(str(directory), str(saved("tied")), say=lambda _: None)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["up_proj", "linear_1"], "rank_pattern": {r"layers\.1\..*": 7}},
        {"target_modules": ["up_proj"], "trainable_token_indices": [5, 3, 40]},
    ],
)
def test_trainable_parameters_are_those_that_peft_counts(settings, make, saved):
    theirs, directory = make(settings)
    trainable, total = theirs.get_nb_trainable_parameters()
    model = LlavaModel.from_pretrained(saved("gqa"))
    base = sum(leaf.size for leaf in split(model)[1].values())
    model.load_adapter(directory)
    _, params = split(model)
    adapters = {path: leaf for path, leaf in params.items() if is_adapter(path)}
    count = lambda params: count_values(params, model.config, adapters_in(model))
    assert (count(adapters), count(params)) == (trainable, base + trainable)
    assert total - trainable == base
    assert f"adapters: {trainable:,} parameters" in repr(model)


def test_rslora_has_the_alpha_that_was_given(make, saved):
    _, directory = make({"use_rslora": True, "lora_alpha": 16, "r": 8})
    said = []
    alphas = {LLM: 16.0}
    opened = open_source(str(directory), str(saved("gqa")), alphas=alphas, say=said.append)
    assert "adapters with rank 8 and alpha 16 (rsLoRA) in llm.layers.*" in said[1]
    for adapter in opened.adapters.values():
        np.testing.assert_allclose(adapter.scales, 16 / 8**0.5, rtol=1e-12)


def test_a_failed_load_changes_nothing(make, saved, batches):
    _, directory = make({})
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: np.full_like(tensors[name], np.nan)}, file)
    model = LlavaModel.from_pretrained(saved("gqa"))
    before = ours(model, batches["padded"])
    with pytest.raises(CheckpointError, match="NaN"):
        model.load_adapter(directory)
    np.testing.assert_array_equal(ours(model, batches["padded"]), before)
    save_file(tensors, file)
    model.load_adapter(directory)


def test_parts_in_full_have_the_dtype_of_the_model(make, saved):
    _, directory = make({"modules_to_save": ["multi_modal_projector"]})
    model = LlavaModel.from_pretrained(saved("gqa"), dtype="bfloat16")
    model.load_adapter(directory)
    dtypes = {is_adapter(path): str(leaf.dtype) for path, leaf in split(model)[1].items()}
    assert dtypes == {False: "bfloat16", True: "float32"}


def test_a_merge_that_is_refused_changes_nothing(make, saved, batches):
    _, directory = make({"target_modules": ["linear_1", "q_proj"]}, "wide")
    model = LlavaModel.from_pretrained(saved("wide"), quantize="int8")
    model.load_adapter(directory)
    before = ours(model, batches["padded"])
    with pytest.raises(ValueError, match="cannot be merged into quantized weights"):
        model.merge_adapter()
    np.testing.assert_array_equal(ours(model, batches["padded"]), before)


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
