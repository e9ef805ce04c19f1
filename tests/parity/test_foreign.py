"""Checkpoints that other software wrote: read, converted, and read by transformers, unchanged.

`fixtures/README.md` says what wrote them; `expected.npz` beside each has that software's logits.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_jax.config import parse_source
from llava_jax.conversion.convert import Opened, convert, open_source
from llava_jax.conversion.tensor_formats import open_any
from llava_jax.conversion.verify_merge import check_merged
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.models.paths import LLM, VISION
from llava_jax.pretrained.adapters import open_adapter
from llava_jax.pretrained.chat_templates import chat_template
from llava_jax.pretrained.image_processor import load_image_transform
from llava_jax.pretrained.model import LlavaModel
from llava_jax.pretrained.resolve import resolve
from llava_jax.pretrained.safetensors import open_tensors
from llava_jax.pretrained.tokenizer import load_tokenizer

IMAGE = 60  # in the fixtures' batches
FIXTURES = Path(__file__).parent / "fixtures"
ROOT = FIXTURES.parent.parent.parent
BASE = "llm=base/llm,vision=base/clip"
ALPHAS = {LLM: 8.0, VISION: 4.0}

WHOLE = {  # by layout: what a user names as source
    "A 4.37": "hf_4_37",
    "A 4.48": "hf_4_48",
    "A 4.57": "hf_4_57",
    "E": "llava_full",
    "E pickles": "llm=llava_full_bin,vision=base/clip",
    "F": "llm=base/llm,vision=base/clip,projector=llava_stage1/mm_projector.bin",
    "I full": "xtuner_hf/full",
}
TRAINED = {
    "F": ("llava_stage1", BASE),
    "G": ("llava_lora", None),
    "G pickles": ("llava_lora_bin", None),
    "H pretrain": ("xtuner_pth/pretrain/iter_2.pth", BASE),
    "H full": ("xtuner_pth/full/iter_2.pth", BASE),
    "H LoRA": ("xtuner_pth/lora/iter_2.pth", BASE),
    "H ZeRO-2": ("xtuner_pth/zero2/iter_2.pth", BASE),
    "H ZeRO-3": ("xtuner_pth/zero3/iter_2.pth", BASE),
    "I LoRA": ("xtuner_hf/lora", None),
    "I whole": ("xtuner_hf/full", BASE),
    "I LoRA pickles": ("xtuner_hf/lora_bin", None),
    "PEFT 4.48": ("peft_4_48", "hf_4_48"),
    "PEFT 4.48 pickles": ("peft_4_48_bin", "hf_4_48"),
    "PEFT 4.48 tower": ("peft_4_48_tower", "hf_4_48"),
}
CASES = {name: (source, None) for name, source in WHOLE.items()} | {
    f"{name} on a base": case for name, case in TRAINED.items()
}

SHORT = (
    *("A 4.37", "A 4.57", "E pickles", "I full", "F on a base", "G on a base"),
    *("H LoRA on a base", "H ZeRO-3 on a base", "I LoRA on a base", "PEFT 4.48 tower on a base"),
)

# peft 0.21.2 asks transformers 5.23 for it; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(autouse=True)
def beside_fixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the fixtures are relative to their folder."""
    monkeypatch.chdir(FIXTURES)


def expected_of(source: str) -> dict[str, np.ndarray]:
    place = source.split("=")[-1] if "projector=" in source else source.split(",")[0]
    place = FIXTURES / place.removeprefix("llm=")
    while not (place / "expected.npz").is_file():
        place = place.parent
    return dict(np.load(place / "expected.npz"))


def open_with_base(source: str, base: str | None) -> Opened:
    """A .pth of adapters does not say their alpha; all else does."""
    alphas = ALPHAS if "xtuner_pth/" in source and ("lora" in source or "zero2" in source) else {}
    return open_source(parse_source(source), parse_source(base) if base else None, alphas=alphas)


def in_vocabulary(batch: dict, opened: Opened) -> dict:
    """A batch with the image token of the model; those of parts get a new one."""
    ids = np.where(batch["input_ids"] == IMAGE, opened.config.image_token_id, batch["input_ids"])
    return batch | {"input_ids": ids}


@pytest.mark.parity("checkpoints", "the software that wrote them")
@pytest.mark.parametrize(
    "name",
    [case if case in SHORT else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_converted_to_hf(
    name: str, batches: dict, hf_logits: Callable, assert_close: Callable, tmp_path: Path
):
    source, base = CASES[name]
    out = tmp_path / "out"
    opened = open_with_base(source, base)
    convert(opened, out, "hf", merge=bool(opened.adapters))
    hf, info = LlavaForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = LlavaModel.from_pretrained(out)
    for batch_name, expected in expected_of(source).items():
        if batch_name not in batches:
            continue
        batch = in_vocabulary(batches[batch_name], opened)
        width = expected.shape[-1]
        assert_close(hf_logits(hf.eval(), batch)[..., :width], expected, batch, case=name)
        inputs = (batch[key] for key in ("input_ids", "pixel_values", "attention_mask"))
        assert_close(np.asarray(ours(*inputs))[..., :width], expected, batch, case=name)
    assert len(open_tensors(out)) == len(hf.state_dict())


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Opened:
    return open_with_base(*TRAINED[request.param])


def same_trained(opened: Opened, place: Path) -> None:
    """Everything that was trained is at `place` too, bit for bit, and nothing else."""
    again = open_adapter(place, opened.config, opened.abstract, read=open_any)
    values = lambda adapters: {path: x.ranks_and_alphas for path, x in adapters.items()}
    assert values(again.adapters) == values(opened.adapters)
    assert again.tensors.keys() == opened.trained.tensors.keys()
    for path, tensors in opened.trained.tensors.items():
        for ours, theirs in zip(again.tensors[path], tensors, strict=True):
            np.testing.assert_array_equal(ours.read(), theirs.read(), err_msg=path)


@pytest.mark.parity("adapters", "peft", "transformers")
@pytest.mark.parametrize(
    "opened", ["G", "H LoRA", "I LoRA", "PEFT 4.48", "PEFT 4.48 tower"], indirect=True
)
def test_converted_to_peft(
    opened: Opened, batches: dict, hf_logits: Callable, assert_close: Callable, tmp_path: Path
):
    """PEFT puts it on the base in transformers 5, and gets what the writing software had."""
    base, out = tmp_path / "base", tmp_path / "adapter"
    convert(opened, out, "peft")
    convert(dataclasses.replace(opened, trained=None), base, "hf")
    same_trained(opened, out)
    hf = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(hf, out).eval()
    merged = tmp_path / "merged"
    convert(opened, merged, "hf", merge=True)
    whole = LlavaForConditionalGeneration.from_pretrained(merged, dtype=torch.float32).eval()
    batch = in_vocabulary(batches["padded"], opened)
    assert_close(hf_logits(model, batch), hf_logits(whole, batch), batch)
    assert check_merged(opened, merged) < 1e-5


@pytest.mark.parametrize("place", ["peft_4_48", "peft_4_48_tower"])
def test_the_older_era_comes_back_as_it_was(place: str, tmp_path: Path):
    convert(open_source(place, "hf_4_48"), tmp_path / "out", "peft", era=4)
    ours = open_tensors(tmp_path / "out" / "adapter_model.safetensors")
    theirs = open_tensors(Path(place, "adapter_model.safetensors"))
    behind_feature = re.compile(r"vision_tower\..*\.layers\.2\.")
    assert ours.keys() == {name for name in theirs if not behind_feature.search(name)}
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name].read())


@pytest.mark.parametrize("opened", ["G", "G pickles"], indirect=True)
def test_llavas_adapter_comes_back_as_it_was(opened: Opened, tmp_path: Path):
    convert(opened, tmp_path / "out", "llava")
    same_trained(opened, tmp_path / "out")
    ours = torch.load(tmp_path / "out" / "non_lora_trainables.bin", weights_only=True)
    theirs = torch.load("llava_lora_bin/non_lora_trainables.bin", weights_only=True)
    assert ours.keys() == theirs.keys()
    config, base = (
        json.loads(Path(d, "config.json").read_text()) for d in (tmp_path / "out", "base/llm")
    )
    assert config["vocab_size"] == base["vocab_size"]  # or LLaVA's code cannot read the base


@pytest.mark.parametrize("to", ["peft", "llava"])
def test_an_adapter_names_its_base_wherever_it_is_loaded(to: str, tmp_path: Path, monkeypatch):
    convert(open_source("llava_lora", parse_source(BASE)), tmp_path / "out", to)
    monkeypatch.chdir(tmp_path)
    assert open_source("out").adapters
    named = json.loads(Path("out", "adapter_config.json").read_text())["base_model_name_or_path"]
    llm, vision = FIXTURES / "base/llm", FIXTURES / "base/clip"
    assert named == (f"llm={llm},vision={vision}" if to == "peft" else str(llm))


def test_what_llavas_code_has_not_is_refused(tmp_path: Path):
    opened = open_source("hf_4_48")
    other = dataclasses.replace(opened.config, projector_hidden_act="gelu_pytorch_tanh")
    with pytest.raises(ConfigError, match=r"gelu_pytorch_tanh.*--to hf"):
        convert(dataclasses.replace(opened, config=other), tmp_path / "out", "llava")
    llm = dataclasses.replace(opened.config.llm, model_type="qwen3")
    other = dataclasses.replace(opened.config, llm=llm)
    with pytest.raises(ConfigError, match=r"a qwen3 decoder; use --to hf"):
        convert(dataclasses.replace(opened, config=other), tmp_path / "out", "llava")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["E", "E pickles", "A 4.48"])
def test_converted_to_llava_and_back(name: str, tmp_path: Path):
    """Every tensor comes back, in names that LLaVA's code wrote too."""
    first = open_source(parse_source(WHOLE[name]))
    convert(first, tmp_path / "llava", "llava")
    names = open_tensors(tmp_path / "llava").keys()
    assert {n for n in names if "vision_tower" not in n} == open_any(FIXTURES / "llava_full").keys()
    second = open_source(str(tmp_path / "llava"))
    assert second.config == first.config or name == "A 4.48"  # which has no tokenizer
    for path, tensors in first.tensors.items():
        for ours, theirs in zip(second.tensors[path], tensors, strict=True):
            assert np.array_equal(ours.read(), theirs.read()), path


def test_names_of_transformers_5(tmp_path: Path):
    convert(open_source("hf_4_48"), tmp_path / "out", "hf5")
    names = open_tensors(tmp_path / "out").keys()
    assert "vision_tower.embeddings.class_embedding" in names
    assert open_source(str(tmp_path / "out")).fingerprint == open_source("hf_4_48").fingerprint


@pytest.mark.parametrize(
    ("source", "base", "to", "message"),
    [
        ("llava_lora", None, "hf", "use --to peft, or add --merge"),
        ("hf_4_48", None, "peft", "no adapters to write"),
        ("xtuner_hf/lora", None, "llava", "cannot store .* vision.* add --merge"),
        ("xtuner_pth/full/iter_2.pth", BASE, "peft", "no adapters to write"),
    ],
)
def test_what_a_form_cannot_hold_is_refused(source, base, to, message, tmp_path):
    opened = open_source(source, parse_source(base) if base else None)
    with pytest.raises(ConfigError, match=message):
        convert(opened, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["hf", "llava", "peft"])
def test_merging_takes_adapters(to: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="no adapters to merge; remove --merge"):
        convert(open_source("hf_4_48"), tmp_path / "out", to, merge=True)


def test_a_model_without_a_projector_is_not_made_up(tmp_path: Path):
    """Neither the base that an adapter names has one, nor the adapter."""
    lora = tmp_path / "lora"
    shutil.copytree("xtuner_hf/lora/llm_adapter", lora)
    settings = json.loads((lora / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = BASE
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"neither {lora} nor {BASE} has a projector"):
        LlavaModel.from_pretrained(lora)


def test_what_a_source_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lora = "xtuner_pth/lora/iter_2.pth"
    with pytest.raises(CheckpointError, match=r"does not contain their alpha.*--alpha"):
        open_source(lora, parse_source(BASE))
    with pytest.raises(ConfigError, match=r"does not name the base .*with --base"):
        open_source(lora)
    with pytest.raises(ConfigError, match=rf"^{BASE} has no projector; give all parts: llm="):
        open_source(parse_source(BASE))
    with pytest.raises(ConfigError, match=rf"trained part, .* model: {BASE} and --base hf_4_48"):
        open_source(parse_source(BASE), "hf_4_48")
    with pytest.raises(ConfigError, match=r"only a part of an XTuner export; .*: xtuner_hf/lora$"):
        open_source("xtuner_hf/lora/llm_adapter")
    with pytest.raises(ConfigError, match=r"llm_adapter has no projector; give .*: --base llm="):
        open_source("xtuner_hf/lora/llm_adapter", parse_source(BASE))
    with pytest.raises(ConfigError, match=r"has alpha 8 in .*, but alpha 9 was given"):
        open_source("llava_lora", alphas={LLM: 9.0})
    for text in ("llm=base/llm", "llm=base/llm,vison=base/clip"):
        with pytest.raises(ConfigError, match=r"the format is llm=DIR,vision=DIR"):
            parse_source(text)
    with pytest.raises(CheckpointError, match="llava-jax convert"):
        resolve("llava_full_bin")
    with pytest.raises(CheckpointError, match=r"llava-jax convert .*--to peft --base MODEL"):
        resolve(lora)
    monkeypatch.chdir(tmp_path)  # where the names of its base lead nowhere
    with pytest.raises(ConfigError, match=r"trained on llm=base/llm.*give the base with --base"):
        open_source(str(FIXTURES / "llava_lora"))


def test_a_place_without_weights_is_answered_with_what_is_in_it(tmp_path: Path):
    """Not with the advice to convert it, as in training, nor with a question for its base."""
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "empty").mkdir()
    for place, message in {
        ".": r"\. is not a checkpoint; give the path of a checkpoint in it: ",
        str(tmp_path / "notes.txt"): "neither a safetensors file nor a pickle",
        "xtuner_hf": "give the path of a checkpoint in it: full, lora, lora_bin$",
        "xtuner_pth/lora": r"give the path of a checkpoint in it: iter_2\.pth$",
        str(tmp_path / "empty"): r"has no weights, such as model\.saf.* \(found: nothing\)$",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_source(place)
    with pytest.raises(CheckpointError, match="neither a safetensors file nor a pickle"):
        open_source("README.md", "hf_4_48")


def test_deepspeeds_states_below_do_not_hide_what_was_trained(tmp_path: Path):
    """A run's own directory, with what it left to go on from."""
    run = shutil.copytree("llava_stage1", tmp_path / "run")
    shutil.copytree("xtuner_pth/zero2/iter_2.pth", run / "checkpoint-3" / "global_step3")
    opened = open_with_base(str(run), BASE)
    assert opened.trained is not None
    assert {path.split(".")[0] for path in opened.trained.tensors} == {"projector"}


def test_images_are_padded_as_llavas_config_says(tmp_path: Path):
    convert(open_source("llava_full"), tmp_path / "hf", "hf")
    assert load_image_transform(tmp_path / "hf").aspect == "pad"
    convert(open_source("llava_full"), tmp_path / "llava", "llava", aspect="crop")
    written = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert written["image_aspect_ratio"] == "square"


@pytest.mark.parametrize("name", ["H LoRA", "I LoRA", "I full"])
def test_xtuners_prompt_and_padding(name: str, tmp_path: Path):
    """XTuner stores neither, and the tower's own image processor crops."""
    source, base = TRAINED.get(name) or (WHOLE[name], None)
    opened, said = open_with_base(source, base), []
    convert(opened, tmp_path / "out", "hf", merge=bool(opened.adapters), say=said.append)
    tokenizer = load_tokenizer(tmp_path / "out")
    expected = chat_template(TEMPLATES["vicuna_xtuner"], tokenizer, "<image>")
    assert tokenizer.chat_template == expected
    assert load_image_transform(tmp_path / "out").aspect == "pad"
    assert any("template is vicuna_xtuner" in line for line in said)


@pytest.mark.parametrize(
    ("own", "chosen"),
    [
        (None, "vicuna_v1"),
        ("{{ messages }}", "vicuna_v1"),
        ("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}", "chatml"),
        ("[INST] <<SYS>> {{ messages }}", "llama_2"),
        ("[INST] {{ messages }} [/INST]", "mistral_instruct"),
        ("{% if c['type'] == 'image' %}[INST]{% endif %}", None),
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["converted", "saved"])
def test_a_decoders_own_chat_template_is_not_a_llavas(own, chosen, whole, tmp_path):
    """It would leave images out; what takes images stays."""
    llm = shutil.copytree("base/llm", tmp_path / "llm")
    tokenizer = load_tokenizer(llm)
    names = ["<image>", "<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": names if chosen == "chatml" else names[:2]}
    )
    tokenizer.chat_template = own
    tokenizer.save_pretrained(llm)
    if whole:
        LlavaModel.from_parts(llm, "base/clip").save_pretrained(tmp_path / "out")
    else:
        source = f"llm={llm},vision=base/clip,projector=llava_stage1/mm_projector.bin"
        convert(open_source(parse_source(source)), tmp_path / "out", "hf")
    tokenizer = load_tokenizer(tmp_path / "out")
    expected = chat_template(TEMPLATES[chosen], tokenizer, "<image>") if chosen else own
    assert tokenizer.chat_template == expected


def test_what_llavas_code_needs_of_a_tokenizer(tmp_path: Path):
    """Ids in config.json; and its tokenizer is made of tokenizer.model alone."""
    said = []
    convert(open_source("llava_full"), tmp_path / "whole", "llava", say=said.append)
    assert not any("tokenizer.model" in line for line in said)
    convert(open_source("llava_lora"), tmp_path / "lora", "llava")
    for name in ("whole", "lora"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    convert(open_source("hf_4_48"), tmp_path / "without", "llava", say=said.append)
    assert "hf_4_48 has no tokenizer.model" in said[-1]


def test_a_failed_proof_leaves_nothing(tmp_path: Path):
    def refuse(opened: Opened, written: Path) -> None:
        assert (written / "model.safetensors").is_file()
        raise CheckpointError("not the same")

    with pytest.raises(CheckpointError, match="not the same"):
        convert(open_source("llava_lora"), tmp_path / "out", "hf", merge=True, prove=refuse)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch):
    opened = open_source("hf_4_48")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_jax.conversion.convert.write_model_config", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(opened, tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_what_it_found(tmp_path: Path):
    tool, out = str(ROOT / "tools" / "convert.py"), str(tmp_path / "out")
    command = [sys.executable, tool, "llava_lora", out, "--to", "hf", "--merge"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "base/llm: Hugging Face decoder\n" in run.stdout
    assert "projector trained in full (Hugging Face decoder; LLaVA's own code)\n" in run.stdout
    assert "100.0% of the most likely tokens are the same" in run.stdout
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, "exists" in run.stderr, "Traceback" in run.stderr) == (1, True, False)


def test_a_base_of_other_weights_is_refused(tmp_path: Path):
    """An adapter that says which weights it was trained on is held to them."""
    convert(open_source("peft_4_48", "hf_4_48"), tmp_path / "adapter", "peft")
    tensors = load_file("hf_4_37/model.safetensors")
    name = "language_model.model.norm.weight"
    shutil.copytree("hf_4_37", tmp_path / "other")
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / "other" / "model.safetensors")
    assert open_source(str(tmp_path / "adapter"), "hf_4_37").adapters
    with pytest.raises(CheckpointError, match=r"trained on .*hf_4_48, but .* has other weights"):
        open_source(str(tmp_path / "adapter"), str(tmp_path / "other"))
