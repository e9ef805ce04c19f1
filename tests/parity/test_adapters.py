"""Adapters go to PEFT and come from it unchanged, and mean the same there."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from llava_jax.config import VISION_LINEARS, LoraConfig, ModelConfig
from llava_jax.errors import CheckpointError
from llava_jax.models.adapter_settings import expand
from llava_jax.models.build import build_model
from llava_jax.models.layers import Params
from llava_jax.models.paths import LLM, VISION
from llava_jax.pretrained.adapters import load_adapter, open_adapter
from llava_jax.pretrained.peft import save_adapter

pytestmark = [
    # peft 0.21.2 asks transformers 5.23 for it; nothing of ours.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.parity("adapters", "peft", "transformers"),
]

SETTINGS = {
    "llm": {LLM: LoraConfig(4, 8.0, 0.1)},
    "both": {
        LLM: LoraConfig(4, 8.0, 0.05, ("q_proj", "v_proj", "down_proj")),
        VISION: LoraConfig(2, 6.0, 0.05, ("q_proj", "out_proj", "fc1")),
    },
    "vision": {VISION: LoraConfig(3, 5.0, 0.0, VISION_LINEARS)},
}
BASE = {"base_name": "org/tiny", "fingerprint": "0123"}


def random_like(abstract: dict[str, jax.ShapeDtypeStruct], seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    draw = lambda spec: jax.numpy.asarray(rng.normal(0, 0.2, spec.shape).astype(np.float32))
    return {path: draw(spec) for path, spec in abstract.items()}


@pytest.fixture
def trained(load: Callable, saved: Callable) -> Callable:
    """Adapters' settings -> a model with random adapters and a random projector."""

    def make(name: str) -> tuple[nnx.GraphDef, Params, Params, ModelConfig]:
        _, params, config = load(saved("gqa"))
        graphdef, abstract = build_model(config, expand(SETTINGS[name], config))
        trains = lambda path: "lora" in path or path.startswith("projector.")
        trainable = random_like({path: spec for path, spec in abstract.items() if trains(path)})
        return graphdef, params, trainable, config

    return make


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_what_we_wrote(
    name, trained, make_hf, our_logits, hf_logits, batches, assert_close, assert_same, tmp_path
):
    graphdef, params, trainable, config = trained(name)
    save_adapter(tmp_path, trainable, expand(SETTINGS[name], config), config, **BASE)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(make_hf("gqa")), tmp_path).eval()
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    # Every module of PEFT's has a tensor, and the reverse.
    assert_same(load_file(tmp_path / "adapter_model.safetensors"), loaded)
    batch = batches["padded"]
    theirs = hf_logits(model, batch)
    assert_close(our_logits(graphdef, params | trainable, batch), theirs, batch)
    assert np.abs(theirs - hf_logits(make_hf("gqa"), batch)).max() > 0.1  # it does something


@pytest.mark.parametrize("name", SETTINGS)
def test_we_load_what_we_wrote(name, trained, abstract_params, tmp_path):
    _, _, trainable, config = trained(name)
    save_adapter(tmp_path, trainable, expand(SETTINGS[name], config), config, **BASE)
    adapter = open_adapter(tmp_path, config, abstract_params(config))
    meaning = lambda adapters: {path: found.ranks_and_alphas for path, found in adapters.items()}
    assert meaning(adapter.adapters) == meaning(expand(SETTINGS[name], config))
    assert (adapter.base_name, adapter.fingerprint) == ("org/tiny", "0123")
    params = adapter.load()
    assert params.keys() == trainable.keys() == adapter.abstract.keys()
    for path, value in trainable.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)


@pytest.fixture(scope="module")
def peft_made(make_hf: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A PEFT model with random adapters and projector, and the directory it was saved to."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["q_proj", "v_proj", "fc2"],  # of both stacks, vision's last layer too
        rank_pattern={r".*vision_tower.*": 2},
        modules_to_save=["multi_modal_projector"],
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(make_hf("gqa")), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    directory = tmp_path_factory.mktemp("peft")
    model.save_pretrained(directory)
    return model, directory


def test_we_load_what_peft_wrote(
    peft_made, load, saved, abstract_params, our_logits, hf_logits, batches, assert_close
):
    model, directory = peft_made
    _, params, config = load(saved("gqa"))
    adapter = open_adapter(directory, config, abstract_params(config))
    vision = LoraConfig(2, 10.0, 0.0, ("q_proj", "v_proj", "fc2"))
    decoder = LoraConfig(4, 10.0, 0.0, ("q_proj", "v_proj"))
    assert adapter.adapters == expand({LLM: decoder, VISION: vision}, config)
    graphdef, _ = build_model(config, adapter.adapters)
    batch = batches["padded"]
    ours = our_logits(graphdef, params | adapter.load(), batch)
    assert_close(ours, hf_logits(model, batch), batch)


def edited(directory: Path, target: Path, edit: Callable[[dict], dict]) -> Path:
    """A copy of an adapter whose tensors `edit` has changed."""
    target.mkdir()
    (target / "adapter_config.json").write_text((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file(edit(tensors), target / "adapter_model.safetensors")
    return target


def old_era(name: str) -> str:
    """transformers up to 4.51: the decoder's tree hangs under language_model."""
    name = name.replace("model.model.language_model.", "model.language_model.model.")
    name = name.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")
    return name.replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")


def test_names_of_the_older_era_are_the_same_adapter(
    peft_made, load, saved, abstract_params, assert_same, tmp_path
):
    _, _, config = load(saved("gqa"))
    abstract = abstract_params(config)
    rename = lambda tensors: {old_era(name): x for name, x in tensors.items()}
    old = edited(peft_made[1], tmp_path / "old", rename)
    expected = open_adapter(peft_made[1], config, abstract).load()
    assert_same(open_adapter(old, config, abstract).load(), expected)


A_KEY = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"


def test_everything_amiss_is_one_error(peft_made, load, saved, abstract_params, tmp_path):
    _, _, config = load(saved("gqa"))

    def damage(tensors: dict) -> dict:
        del tensors[A_KEY]  # missing
        wrong_rank = A_KEY.replace("layers.1", "layers.2")
        tensors[wrong_rank] = torch.zeros(5, 32)
        tensors["base_model.model.model.multi_modal_projector.linear_9.lora_A.weight"] = (
            torch.zeros(1, 1)
        )
        return tensors

    bad = edited(peft_made[1], tmp_path / "bad", damage)
    with pytest.raises(CheckpointError) as error:
        open_adapter(bad, config, abstract_params(config))
    for part in (
        r"missing tensors \(1\):\n  .*layers\.1\.self_attn\.q_proj",
        r"do not belong to the model \(1\):\n  .*linear_9",
        r"with the wrong shape \(1\):\n  .*layers\.2.* has shape \[5, 32\], expected \[4, 32\]",
    ):
        assert re.search(part, str(error.value)), error.value


def test_an_adapter_of_another_model_is_refused(peft_made, load, saved, abstract_params, tmp_path):
    _, _, config = load(saved("gqa"))
    rename = lambda tensors: {
        name.replace("language_model", "model"): x for name, x in tensors.items()
    }
    only_llm = lambda tensors: rename({n: x for n, x in tensors.items() if "language_model" in n})
    bad = edited(peft_made[1], tmp_path / "bad", only_llm)
    with pytest.raises(CheckpointError, match="fit none of the known layouts"):
        open_adapter(bad, config, abstract_params(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"rank_pattern": {"v_proj": 7}}, r"has shape \[4, 32\], expected \[7, 32\]"),
    ],
)
def test_unsupported_settings_are_refused(
    change, message, peft_made, load, saved, abstract_params, tmp_path
):
    _, _, config = load(saved("gqa"))
    bad = edited(peft_made[1], tmp_path / "bad", lambda tensors: tensors)
    settings = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(CheckpointError, match=message):
        open_adapter(bad, config, abstract_params(config))


@pytest.fixture
def ours(trained: Callable, tmp_path: Path) -> tuple:
    """An adapter directory of ours, and the arguments that a run of its kind reads it with."""
    _, _, trainable, config = trained("both")
    adapters = expand(SETTINGS["both"], config)
    save_adapter(tmp_path, trainable, adapters, config, **BASE)
    run = {
        "adapters": adapters,
        "config": config,
        "abstract": build_model(config, adapters)[1],
        "trainable": set(trainable),
        "fingerprint": "0123",
    }
    return tmp_path, run, trainable


def test_a_run_goes_on_with_an_adapter_of_its_kind(ours):
    directory, run, trainable = ours
    params = load_adapter(directory, **run)
    assert params.keys() == trainable.keys()
    load_adapter(directory, **run | {"fingerprint": None})


def test_a_run_refuses_an_adapter_of_another_kind(ours):
    directory, run, trainable = ours
    other = expand({LLM: LoraConfig(8, 8.0, 0.05, ("q_proj", "v_proj"))}, run["config"])
    only_lora = {path for path in trainable if "lora" in path}
    changed = {"adapters": other, "trainable": only_lora, "fingerprint": "4567"}
    with pytest.raises(CheckpointError) as error:
        load_adapter(directory, **run | changed)
    for part in (
        r"llm\.layers\.\*, .* \(4, 8\.0, \['down_proj', 'q_proj', 'v_proj'\]\), but .* has \(8, ",
        r"vision\.encoder\.layers\.\*, .*, but the run has None; .*--vision-lora",
        r"contains projector\.linear_1\.bias, .* does not train",
        r"trained on org/tiny with fingerprint 0123, but the run's base has fingerprint 4567",
    ):
        assert re.search(part, str(error.value)), error.value


def test_what_an_adapter_cannot_hold_is_refused(trained, tmp_path):
    _, params, trainable, config = trained("llm")
    adapters = expand(SETTINGS["llm"], config)
    norm = {"llm.norm.weight": params["llm.norm.weight"]}
    with pytest.raises(ValueError, match=r"cannot store .*: llm\.norm\.weight"):
        save_adapter(tmp_path, trainable | norm, adapters, config, **BASE)


def test_a_vision_tower_tuned_in_full_goes_with_the_adapter(
    trained, make_hf, our_logits, hf_logits, batches, assert_close, tmp_path
):
    graphdef, params, trainable, config = trained("llm")
    adapters = expand(SETTINGS["llm"], config)
    tower = {path: x + 0.1 for path, x in params.items() if path.startswith("vision.")}
    unused = {p for p in tower if p.startswith(("vision.encoder.tail.", "vision.post_layernorm."))}
    trained_tower = {path: x for path, x in tower.items() if path not in unused}
    with pytest.raises(ValueError, match="complete vision tower"):
        save_adapter(tmp_path, trainable | trained_tower, adapters, config, **BASE)
    save_adapter(tmp_path, trainable | tower, adapters, config, **BASE)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(make_hf("gqa")), tmp_path).eval()
    batch = batches["one_image"]
    ours = our_logits(graphdef, params | trainable | tower, batch)
    assert_close(ours, hf_logits(model, batch), batch)
    trainable |= trained_tower
    abstract = build_model(config, adapters)[1]
    loaded = load_adapter(tmp_path, adapters, config, abstract, set(trainable), "0123")
    assert loaded.keys() == trainable.keys()
