"""What we write beside a model makes transformers see what the model was trained on."""

import dataclasses
import importlib.resources
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import whole
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_jax.config import LlmConfig, ModelConfig, Parts, VisionConfig
from llava_jax.data.conversation import Turn, encode, encode_prompt
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.images import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, ImageTransform
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.chat_templates import chat_template, choose_template
from llava_jax.pretrained.image_processor import load_image_transform
from llava_jax.pretrained.model_config import read_parts_config, write_model_config
from llava_jax.pretrained.processor import save_processor
from llava_jax.pretrained.tokenizer import load_tokenizer

pytestmark = pytest.mark.parity("tokens and pixels", "transformers")

TEXTS = (
    "Hello world",
    "a  b    c",
    "  two",
    "x\n\nyz",
    "def f():\n        if x:\n            y   =  1",
    "日本語 🦙 ünï",
)


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    file = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    return sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())


@pytest.fixture(scope="module")
def vicuna_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder's directory with nothing but a tokenizer.model, as Vicuna's is."""
    directory = tmp_path_factory.mktemp("vicuna")
    file = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    (directory / "tokenizer.model").write_bytes(file.read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 4096}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000}))
    return directory


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA's directory with a byte-level tokenizer that adds no first token."""
    directory = tmp_path_factory.mktemp("bytes")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<pad>", "<image>", *CONTROLS]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["USER: what colour is it? ASSISTANT: red"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>", *CONTROLS],
    )
    tokenizer.save_pretrained(directory)
    images = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    return directory


# Of Llama 3 and ChatML.
CONTROLS = (
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|im_start|>", "<|im_end|>"),
)
VISION = VisionConfig(28, 14, 16, 16, 2, 2)
LLM = LlmConfig(320, 16, 16, 1, 2, 2, 8, 128)
CONFIG = ModelConfig(VISION, LLM, image_token_id=3, pad_token_id=2)


@pytest.mark.parametrize(
    ("name", "own", "ends"),
    [
        ("vicuna_v1", None, "</s>"),
        ("plain", None, "</s>"),
        ("llama_3", None, ["</s>", "<|eot_id|>"]),
        ("chatml", None, ["</s>", "<|im_end|>"]),
        ("chatml", ["<|im_end|>", "</s>"], ["<|im_end|>", "</s>"]),
        (None, ["<|im_end|>", "</s>"], ["<|im_end|>", "</s>"]),
    ],
)
def test_generation_ends_where_the_templates_answers_do(name, own, ends, byte_level, tmp_path):
    source = shutil.copytree(byte_level, tmp_path / "source")
    ids_of = load_tokenizer(source).convert_tokens_to_ids
    if own:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ids_of(own)}))
    out = tmp_path / "out"
    out.mkdir()
    save_processor(source, out, CONFIG, template=TEMPLATES[name] if name else None)
    written = json.loads((out / "generation_config.json").read_text())
    assert written["eos_token_id"] == ids_of(ends)


def test_a_decoders_control_tokens_choose_the_template(byte_level):
    """Also where XTuner trained it: only with Vicuna is its prompt another."""
    assert {choose_template(byte_level, is_xtuner=x) for x in (True, False)} == {"llama_3"}


@pytest.mark.parity("tokens and pixels", "sentencepiece")
def test_a_tokenizer_model_is_read_as_sentencepiece_reads_it(vicuna_like, pieces, assert_parity):
    tokenizer = load_tokenizer(vicuna_like)
    ids = {text: tokenizer(text).input_ids for text in TEXTS}
    different = [text for text in TEXTS if ids[text] != [1, *pieces.encode(text)]]
    assert_parity(f"texts that differ, of {len(TEXTS)}", len(different), 0)
    for text in TEXTS:
        assert tokenizer.decode(ids[text], skip_special_tokens=True) == text


def test_a_written_tokenizer_stays_the_same_in_transformers(vicuna_like, pieces, tmp_path):
    parts = Parts(str(vicuna_like), str(_vision(tmp_path / "vision")))
    config = read_parts_config(parts)
    assert (config.image_token_id, config.pad_token_id) == (32000, 32001)
    assert config.llm.vocab_size == 32064
    out = tmp_path / "out"
    out.mkdir()
    write_model_config(config, out)
    save_processor(parts, out, config, template=TEMPLATES["vicuna_v1"], aspect="pad")
    for tokenizer in (load_tokenizer(out), AutoTokenizer.from_pretrained(out)):
        for text in TEXTS:
            assert tokenizer(text).input_ids == [1, *pieces.encode(text)], text
        assert tokenizer.pad_token_id == 32001
        assert tokenizer("<image>", add_special_tokens=False).input_ids == [32000]


def _vision(directory: Path) -> Path:
    directory.mkdir()
    settings = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def written(byte_level: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Aspect -> a directory with a processor of ours and a random model."""
    done: dict[str, Path] = {}

    def write(aspect: str) -> Path:
        if aspect not in done:
            done[aspect] = out = tmp_path_factory.mktemp(aspect)
            template = TEMPLATES["vicuna_v1"]
            save_processor(byte_level, out, CONFIG, template=template, aspect=aspect)
            write_model_config(CONFIG, out, "float32")
        return done[aspect]

    return write


MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same colour?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    {"role": "user", "content": [{"type": "text", "text": "why?"}]},
]
TURNS = [
    Turn("human", "<image>\n<image>\nsame colour?"),
    Turn("gpt", "no"),
    Turn("human", "why?"),
]


@pytest.mark.parametrize("form", ["one call", "two calls"])
def test_prompts_are_those_of_training(form, written, assert_same):
    out = written("pad")
    processor = AutoProcessor.from_pretrained(out)
    tokenizer = load_tokenizer(out)
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    if form == "two calls":
        theirs = processor(images=pictures, text=text, return_tensors="np").input_ids[0]
    else:
        messages = json.loads(json.dumps(MESSAGES))
        for part, picture in zip(messages[0]["content"], pictures, strict=False):
            part["image"] = picture
        theirs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="np",
        ).input_ids[0]  # fmt: skip
    ours = encode_prompt(TURNS, TEMPLATES["vicuna_v1"], tokenizer, CONFIG.image_token_id)
    ours = expand_images(ours, CONFIG, whole(CONFIG, len(pictures)))
    assert_same({"ids": ours.input_ids}, {"ids": theirs})


def test_a_whole_conversation_ends_its_answers(written):
    processor = AutoProcessor.from_pretrained(written("pad"))
    text = processor.apply_chat_template(MESSAGES[:2], tokenize=False)
    assert text.startswith("<s>A chat between a curious user")
    assert text.endswith("ASSISTANT: no</s>")
    tokenizer = load_tokenizer(written("pad"))
    ours = encode(TURNS[:2], TEMPLATES["vicuna_v1"], tokenizer, CONFIG.image_token_id)
    assert tokenizer(text, add_special_tokens=False).input_ids == ours.input_ids.tolist()


@pytest.mark.parametrize("beginning", ["", "Be brief.", None], ids=["none", "brief", "own"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["vicuna", "bytes", "bytes that add a bos"])
def test_every_template_is_one_for_transformers(kind, name, beginning, vicuna_like, byte_level):
    """What apply_chat_template gives, the tokenizer makes into the ids of training."""
    if kind == "vicuna":
        tokenizer = load_tokenizer(Parts(str(vicuna_like), "", None))
        tokenizer.add_tokens(list(CONTROLS), special_tokens=True)
    else:
        tokenizer = load_tokenizer(byte_level)
        if kind != "bytes":
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)]
            )
    template, image = TEMPLATES[name], tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.chat_template = chat_template(template, tokenizer, "<image>")
    messages, turns = MESSAGES, TURNS
    if beginning is not None:
        messages = [{"role": "system", "content": beginning}, *messages]
        turns = [Turn("system", beginning), *turns]
    for added in (False, True):
        shown = messages if added else messages[:-1]
        text = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=added)
        ours = (encode_prompt if added else encode)(turns[: len(shown)], template, tokenizer, image)
        assert tokenizer(text).input_ids == ours.input_ids.tolist()


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
def test_pixels_are_those_of_training(aspect, written, assert_parity):
    out = written(aspect)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (45, 70, 3), dtype=np.uint8))
    transform = load_image_transform(out)
    assert transform.aspect == aspect
    assert transform.mean == CLIP_MEAN
    theirs = AutoProcessor.from_pretrained(out).image_processor(image, return_tensors="np")
    apart = np.abs(transform(image) - theirs.pixel_values[0])
    steps = np.rint(255 * apart * np.array(transform.std)[:, None, None])
    assert_parity("pixels, in steps of 1/255", steps.max(), 1)  # libraries round differently


SIGLIP = dataclasses.replace(
    CONFIG,
    vision=VisionConfig(30, 14, 16, 16, 2, 2, model_type="siglip_vision_model"),
    vision_feature_select_strategy="full",
)


@pytest.fixture
def siglip_like(byte_level: Path, tmp_path: Path) -> Path:
    """A LLaVA's directory with the image processor that SigLIP's own class writes."""
    directory = Path(shutil.copytree(byte_level, tmp_path / "siglip"))
    SiglipImageProcessorPil(size={"height": 30, "width": 30}).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("aspect", [None, "pad", "crop", "squash"])
@pytest.mark.parametrize("strategy", ["full", "default"])
def test_a_siglips_processor(aspect, strategy, siglip_like, tmp_path):
    """What we write gives transformers the pixels, and the count of image tokens, of training."""
    config = dataclasses.replace(SIGLIP, vision_feature_select_strategy=strategy)
    out = tmp_path / "out"
    out.mkdir()
    save_processor(siglip_like, out, config, template=TEMPLATES["plain"], aspect=aspect)
    transform = load_image_transform(out)
    assert transform == load_image_transform(siglip_like, aspect)
    assert (transform.height, transform.width, transform.mean) == (30, 30, SIGLIP_MEAN)
    assert transform.aspect == (aspect or "squash")
    processor = AutoProcessor.from_pretrained(out)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (45, 70, 3), dtype=np.uint8))
    theirs = processor(images=image, text="<image>", return_tensors="np")
    np.testing.assert_allclose(
        transform(image), theirs.pixel_values[0], rtol=0, atol=1 / 255 / SIGLIP_STD[0]
    )
    count = int((theirs.input_ids == config.image_token_id).sum())
    assert count == config.image_tokens == {"full": 4, "default": 3}[strategy]


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_image_tokens_of_clip_are_counted(strategy, byte_level, tmp_path):
    config = dataclasses.replace(CONFIG, vision_feature_select_strategy=strategy)
    save_processor(byte_level, tmp_path, config, template=TEMPLATES["plain"], aspect="crop")
    theirs = AutoProcessor.from_pretrained(tmp_path)(
        images=Image.new("RGB", (40, 30)), text="<image>", return_tensors="np"
    )
    count = int((theirs.input_ids == config.image_token_id).sum())
    assert count == config.image_tokens == {"full": 5, "default": 4}[strategy]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_without_a_processor_gets_its_own_kinds(kind, tmp_path):
    settings = {"model_type": f"{kind}_vision_model", "image_size": 30, "patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    transform = load_image_transform(Parts("nowhere", str(tmp_path)))
    mean, std = (CLIP_MEAN, CLIP_STD) if kind == "clip" else (SIGLIP_MEAN, SIGLIP_STD)
    assert transform == ImageTransform(30, 30, 30, mean, std)


def test_transformers_generates(written, tmp_path):
    out = shutil.copytree(written("pad"), tmp_path / "model")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(out)).eval()
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    model = LlavaForConditionalGeneration.from_pretrained(out)
    processor = AutoProcessor.from_pretrained(out)
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    pictures = [Image.new("RGB", (40, 30)), Image.new("RGB", (20, 30))]
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=3)
    assert tokens.shape[1] > inputs.input_ids.shape[1]


def test_a_tokenizer_of_another_model_is_refused(byte_level, tmp_path):
    other = dataclasses.replace(CONFIG, image_token_id=310)
    with pytest.raises(
        CheckpointError, match="has the id 310, but the tokenizer has the id 3 for <image>"
    ):
        save_processor(byte_level, tmp_path, other, template=TEMPLATES["vicuna_v1"], aspect="pad")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop false"),
        ({"resample": 2}, "resample 2"),
        ({"size": {"longest_edge": 28}}, "size must be a shortest_edge"),
        ({"size": {"height": 30, "width": 30}}, "do_center_crop true, .* or a height and width"),
    ],
)
def test_other_image_processors_are_refused(change, message, byte_level, tmp_path):
    settings = json.loads((byte_level / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(CheckpointError, match=message):
        load_image_transform(tmp_path)


def test_forms_of_the_image_settings(byte_level, tmp_path):
    """Bare numbers (transformers 4.2x), and nested in processor_config.json (transformers 5)."""
    expected = load_image_transform(byte_level)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    (old / "preprocessor_config.json").write_text(json.dumps({"size": 28, "crop_size": 28}))
    settings = json.loads((byte_level / "preprocessor_config.json").read_text())
    (new / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert load_image_transform(old) == load_image_transform(new) == expected
    shutil.rmtree(old)
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        load_image_transform(old)
