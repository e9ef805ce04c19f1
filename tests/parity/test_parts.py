"""Decoders and vision towers that are pickles alone: rewritten, and read by transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from llava_jax.cli import convert
from llava_jax.config import Parts
from llava_jax.conversion.single_part import convert_part, open_part
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.pretrained.model import LlavaModel

BASE = Path(__file__).parent / "fixtures" / "base"


def pickle_of(model: PreTrainedModel, state: dict, directory: Path, *, shards: int = 1) -> Path:
    """A directory as transformers 4 wrote it, with pytorch_model.bin or shards of it."""
    directory.mkdir()
    model.config.save_pretrained(directory)
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return directory
    files = {name: f"pytorch_model-0000{i % shards + 1}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({n: x for n, x in state.items() if files[n] == file}, directory / file)
    index = json.dumps({"metadata": {}, "weight_map": files})
    (directory / "pytorch_model.bin.index.json").write_text(index)
    return directory


def rewritten(source: Path, out: Path, dtype: str | None = None) -> Path:
    part = open_part(str(source))
    assert part is not None
    convert_part(part, out, dtype)
    assert not list(out.glob("*.bin*"))
    return out


@pytest.mark.parity("checkpoints", "transformers")
@pytest.mark.parametrize("variant", ["gqa", "tied", "mistral", "qwen2", "qwen3"])
def test_a_decoder_alone(variant, make_hf, hf_logits, batches, tmp_path, assert_same):
    hf = make_hf(variant)
    decoder = AutoModelForCausalLM.from_config(hf.config.text_config).eval()
    decoder.model.load_state_dict(hf.model.language_model.state_dict())
    if variant != "tied":
        decoder.lm_head.load_state_dict(hf.lm_head.state_dict())
    source = pickle_of(decoder, decoder.state_dict(), tmp_path / "bin", shards=2)
    out = rewritten(source, tmp_path / "out")
    ours, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert type(ours) is type(decoder)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = {"input_ids": batches["text_only"]["input_ids"]}
    logits = [{"logits": hf_logits(model.eval(), batch)} for model in (ours, decoder)]
    assert_same(*logits)


@pytest.mark.parity("checkpoints", "transformers")
@pytest.mark.parametrize("variant", ["gqa", "siglip"])
@pytest.mark.parametrize("halves", [1, 2])
def test_a_vision_tower_alone(variant, halves, make_hf, batches, tmp_path, assert_same):
    """Also out of a CLIPModel or a SiglipModel, whose other half is left behind."""
    tower = make_hf(variant).model.vision_tower
    kind = tower.config.model_type.removesuffix("_vision_model")
    state = {f"vision_model.{name}": x for name, x in tower.state_dict().items()}
    model = tower
    if halves == 2:
        both = AutoConfig.for_model(kind, vision_config=tower.config.to_dict())
        model = AutoModel.from_config(tower.config)
        model.config = both
        state |= {"text_model.embeddings.token_embedding.weight": torch.zeros(2, 2)}
    source = pickle_of(model, state, tmp_path / "bin")
    out = rewritten(source, tmp_path / "out")
    ours, info = AutoModel.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert type(ours) is type(tower)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.from_numpy(np.array(batches["one_image"]["pixel_values"]))
    with torch.no_grad():
        states = [m.eval()(pixels, output_hidden_states=True).hidden_states for m in (ours, tower)]
    assert_same(*({str(i): x.numpy() for i, x in enumerate(layers)} for layers in states))


def test_a_llava_starts_from_the_two(tmp_path: Path):
    """What lies beside the weights comes along; the parts give what those of safetensors give."""
    llm, out = tmp_path / "llm", {"llm": tmp_path / "1", "vision": tmp_path / "2"}
    shutil.copytree(BASE / "llm", llm)
    torch.save(load_file(llm / "model.safetensors"), llm / "pytorch_model.bin")
    (llm / "model.safetensors").unlink()
    for name in ("llm", "vision"):
        rewritten(llm if name == "llm" else BASE / "clip_openai", out[name])
    beside = {file.name for file in llm.iterdir()} - {"pytorch_model.bin"}
    assert {file.name for file in out["llm"].iterdir()} == beside | {"model.safetensors"}
    assert (out["vision"] / "preprocessor_config.json").is_file()
    ours = LlavaModel.from_parts(out["llm"], out["vision"])
    expected = LlavaModel.from_parts(BASE / "llm", BASE / "clip")
    ids = np.array([[1, 5, ours.config.image_token_id, 7]]).repeat([1, 1, 4, 1], axis=1)
    pixels = np.ones((1, 3, 28, 28), np.float32)
    np.testing.assert_array_equal(ours(ids, pixels), expected(ids, pixels))


def test_the_dtype_is_as_asked(tmp_path: Path):
    out = rewritten(BASE / "llm", tmp_path / "out", "bfloat16")
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_is_no_decoder_or_tower_alone(tmp_path: Path):
    fixtures = BASE.parent
    assert open_part(str(fixtures / "hf_4_48")) is None
    assert open_part(Parts(str(BASE / "llm"), str(BASE / "clip"))) is None
    with pytest.raises(ConfigError, match=r"is only a projector; also give its decoder and"):
        open_part(str(fixtures / "xtuner_hf" / "full" / "projector"))
    damaged = shutil.copytree(BASE / "llm", tmp_path / "llm")
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\."):
        open_part(str(damaged))


def test_the_command_line(tmp_path: Path, capsys, monkeypatch):
    main, source = convert.main, str(BASE / "clip_openai")
    assert main([source, str(tmp_path / "out"), "--to", "llava"]) == 1
    assert "not a complete LLaVA model; use --to hf" in capsys.readouterr().err
    odd = ["--merge", "--vision-alpha", "4"]
    assert main([source, str(tmp_path / "out"), "--to", "hf", *odd]) == 1
    assert "use --to hf without --merge, --vision-alpha" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main([str(source), ".", "--to", "hf"]) == 1
    assert ". exists already; give a directory that does not" in capsys.readouterr().err
    assert main([source, str(tmp_path / "out"), "--to", "hf"]) == 0
    assert "only a vision tower (Hugging Face vision tower" in capsys.readouterr().out


@pytest.mark.parametrize(("part", "what"), [("llm", "decoder"), ("clip", "vision tower")])
def test_training_does_not_start_from_a_part_alone(part, what):
    with pytest.raises(CheckpointError, match=rf"this is only a {what}; .*llm=DIR,vision=DIR"):
        LlavaModel.from_pretrained(str(BASE / part))
