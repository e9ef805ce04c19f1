"""The README.md beside an exported model, and its upload."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from llava_jax.config import DataConfig, LoraConfig, TrainConfig, TuneConfig
from llava_jax.errors import ConfigError, RunError
from llava_jax.training import hub
from llava_jax.training.model_card import UNNAMED, model_card

ROWS = [
    {"step": step, "loss": loss, "accuracy": accuracy}
    for step, loss, accuracy in ((0, 2.5, 0.25), (40, 0.5, 0.75), (80, None, 0.5))
]
HUB = "llava-hf/llava-1.5-7b-hf"


def metadata(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_a_card_of_an_adapter():
    config = TrainConfig("mine", lora=LoraConfig(rank=8), push_to_hub="me/mine")
    card = model_card(config, HUB, 80, (1234, 56), ROWS)
    assert metadata(card) == {
        "base_model": HUB,
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "llava_jax", "lora"],
    }
    assert "80 steps on 1,234 samples" in card
    assert "On 56 samples" in card
    assert "| 0 | 2.5000 | 25.0 % |\n| 40 | 0.5000 | 75.0 % |\n| 80 | nan | 50.0 % |" in card
    assert "| `lora.rank` | 8 |" in card
    assert f'base = LlavaForConditionalGeneration.from_pretrained("{HUB}")' in card
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card
    assert "llava-jax chat me/mine" in card
    assert "No license is set" in card


def test_a_card_of_a_model_names_no_path_of_this_machine(tmp_path: Path):
    base = tmp_path / "secret" / "base"
    base.mkdir(parents=True)
    config = TrainConfig("mine", output_dir=str(tmp_path), tune=TuneConfig(llm="full"))
    card = model_card(config, str(base), 80, (1234, 0), [])
    assert "starting from base:" in card
    assert str(tmp_path) not in card
    assert "base_model" not in metadata(card)
    assert metadata(card)["library_name"] == "transformers"
    assert "no eval data" in card
    assert "peft" not in card
    assert "lora.rank" not in card


def test_a_card_of_adapters_of_the_projector_and_of_layer_patterns():
    lora = LoraConfig(rank=8, rank_pattern={"q_proj|k_proj": 4})
    tune = TuneConfig(llm="frozen", projector="lora")
    data = DataConfig(path="a.json", eval_path="a.json")
    config = TrainConfig("mine", tune=tune, lora=lora, data=data)
    card = model_card(config, "base", 80, (1234, 56), ROWS, best=40)
    assert metadata(card)["library_name"] == "peft"
    assert "base_model" not in metadata(card)
    assert "| `lora.rank` | 8 |" in card
    assert "| `lora.alpha` | 256.0 |" in card
    assert "| `lora.rank_pattern.q_proj\\|k_proj` | 4 |" in card
    assert "It has the parameters of step 40, the best evaluation." in card
    assert "not used for training" not in card
    assert "On 56 samples from the eval data of the run:" in card
    data = DataConfig(path="a.json", eval_fraction=0.1)
    card = model_card(dataclasses.replace(config, data=data), "base", 80, (1234, 56), ROWS)
    assert "On 56 samples held out from the training data:" in card


@pytest.fixture
def pushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    return TrainConfig("mine", output_dir=str(tmp_path), push_to_hub="me/mine")


def test_what_cannot_be_pushed_is_said_before_the_run(
    pushing: TrainConfig, monkeypatch: pytest.MonkeyPatch
):
    made = []

    class Api:
        def create_repo(self, repo: str, **given: Any) -> None:
            made.append((repo, given))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    hub.check_push(pushing)
    assert made == [("me/mine", {"private": True, "exist_ok": True})]
    for name in ("a/b/c", "my_model"):
        with pytest.raises(ConfigError, match=f"push_to_hub '{name}' is not a name USER/NAME"):
            hub.check_push(TrainConfig("mine", push_to_hub=name))
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    with pytest.raises(ConfigError, match="push_to_hub me/mine: the hub refuses it"):
        hub.check_push(pushing)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="run `hf auth login`"):
        hub.check_push(pushing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        hub.check_push(pushing)
    hub.check_push(TrainConfig("mine"))


def test_a_result_is_pushed_to_a_private_repository(
    pushing: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls = []

    class Api:
        def upload_folder(self, **given: Any) -> SimpleNamespace:
            calls.append(given)
            return SimpleNamespace(repo_url="https://huggingface.co/me/mine")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    pushing.export_dir.mkdir(parents=True)
    card = pushing.export_dir / "README.md"
    card.write_text(f"license: mit, edited\nllava-jax chat {UNNAMED}\n")
    hub.push(pushing)
    assert card.read_text() == "license: mit, edited\nllava-jax chat me/mine\n"
    assert calls == [
        {
            "repo_id": "me/mine",
            "folder_path": pushing.run_dir / "adapter",
            "commit_message": "Upload mine, trained with llava_jax",
        },
    ]
    assert "to https://huggingface.co/me/mine" in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    with pytest.raises(RunError, match="complete, but it cannot be uploaded to me/mine"):
        hub.push(pushing)
