"""Trains the tokenizer of a tiny model of this package, and writes it with the image processor.

    python tools/tiny_processor.py DIRECTORY
    python tools/tiny_processor.py DIRECTORY --data data/tiny_next/train.json --image-size 32

The first command is for the tiny LLaVA, and the second one for the tiny LLaVA-NeXT. The tokenizer
is a byte-pair encoding like LLaMA's tokenizer: a special character replaces spaces, and unknown
characters are split into bytes. It is trained on questions and answers, by default those of the
training split of easy-VQA, and on the text of the chat template.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_jax.data.conversation import IMAGE_PLACEHOLDER
from llava_jax.data.easy_vqa import COLOURS, SHAPES, read_questions
from llava_jax.data.images import CLIP_MEAN, CLIP_STD
from llava_jax.data.templates import SYSTEM_SLOT, TEMPLATES

VOCABULARY = 512
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's character for a space
CONTROL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def easy_vqa_texts() -> list[str]:
    """Returns the questions and answers of easy-VQA, and captions."""
    captions = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    questions = [f"{question} {answer}" for question, answer, _ in read_questions("train")]
    return [*questions, *captions * 100]


def texts_of(file: Path) -> list[str]:
    """Returns the questions and answers of a LLaVA JSON file."""
    records = json.loads(file.read_text())
    turns = [turn["value"] for record in records for turn in record["conversations"]]
    return [text.replace(IMAGE_PLACEHOLDER, "") for text in turns]


def learn_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a tokenizer in which each word of the texts is one token, and returns it."""
    template = TEMPLATES["vicuna_v1"]
    asked = template.human_prefix.replace(SYSTEM_SLOT, f"{template.system} ")
    around = asked + template.answer_prefix
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*CONTROL, *BYTES], show_progress=False
    )
    # The trainer gets separate words, so that no token contains parts of two words.
    words = " ".join([*texts, *[around] * 100]).split()
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    plain_bytes = json.loads(tokenizer.to_str())
    plain_bytes["added_tokens"] = [
        token for token in plain_bytes["added_tokens"] if token["content"] in CONTROL
    ]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain_bytes)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def image_settings(side: int) -> dict[str, object]:
    """Returns the config of CLIP's image processor for images of side x side pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python tools/tiny_processor.py", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "directory", type=Path, help="directory to write the tokenizer and the image processor to"
    )
    parser.add_argument("--data", type=Path, help="LLaVA JSON file instead of easy-VQA")
    parser.add_argument("--image-size", type=int, default=64, help="side of an image in pixels")
    given = parser.parse_args()
    directory = given.directory
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = learn_tokenizer(texts_of(given.data) if given.data else easy_vqa_texts())
    tokenizer.save_pretrained(directory)
    settings = json.dumps(image_settings(given.image_size), indent=2)
    (directory / "preprocessor_config.json").write_text(settings + "\n")
    print(f"wrote {len(tokenizer)} tokens to {directory}")


if __name__ == "__main__":
    main()
