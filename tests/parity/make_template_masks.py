"""Writes tests/template_masks.json: what the original code of LLaVA and XTuner makes of templates.

Each runs in an environment of its own, and adds its samples to the file:

    python tests/parity/make_template_masks.py llava VOCABULARY    # llava-torch 1.2.2.post1
    python tests/parity/make_template_masks.py xtuner VOCABULARY   # xtuner 0.2.0

VOCABULARY is `tokenizer.model.v1` of the package mistral-common. In the samples, the image is -200,
and a label of -100 is not learned.
"""

import copy
import json
import shutil
import sys
import tempfile
import types
from pathlib import Path
from unittest.mock import MagicMock

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "template_masks.json"
SAMPLES = [
    sample
    for sample in json.loads((HERE.parent / "official_masks.json").read_text())
    if not sample["official_masks_all"] and sample["template"] == "v1"
]


def llava(vocabulary):
    import llava.train.train as train
    from llava import conversation
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer(vocabulary, legacy=True, padding_side="right")
    tokenizer.model_max_length = 2048
    tokenizer.pad_token = tokenizer.unk_token
    arguments = types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    for name in ("llama_2", "mistral_instruct"):
        conversation.default_conversation = conversation.conv_templates[name]
        for sample in SAMPLES:
            source = [copy.deepcopy(sample["conversations"])]
            if sample["has_image"]:
                source = train.preprocess_multimodal(source, arguments)
            done = train.preprocess(source, tokenizer, has_image=sample["has_image"])
            yield name, sample, done["input_ids"][0].tolist(), done["labels"][0].tolist()


def xtuner(vocabulary):
    from transformers import AutoTokenizer

    # Tokenising needs little of what XTuner imports; what is missing is stood in for.
    while True:
        try:
            from xtuner.dataset.map_fns import llava_map_fn, template_map_fn
            from xtuner.dataset.utils import encode_fn
            from xtuner.utils import PROMPT_TEMPLATE

            break
        except ModuleNotFoundError as error:
            sys.modules[error.name] = MagicMock()

    with tempfile.TemporaryDirectory() as directory:  # as Vicuna's, which XTuner opens so
        shutil.copy(vocabulary, Path(directory) / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = AutoTokenizer.from_pretrained(directory)
    for sample in SAMPLES:
        done = llava_map_fn({"conversations": copy.deepcopy(sample["conversations"])})
        done = template_map_fn(done, PROMPT_TEMPLATE.vicuna)
        done = encode_fn(done, tokenizer, 1472, with_image_token=True)
        yield "vicuna_xtuner", sample, done["input_ids"], done["labels"]


def main():
    origin, vocabulary = sys.argv[1:]
    kept = json.loads(OUT.read_text()) if OUT.exists() else []
    kept = [sample for sample in kept if sample["origin"] != origin]
    for template, sample, ids, labels in {"llava": llava, "xtuner": xtuner}[origin](vocabulary):
        if any(label != -100 for label in labels):  # LLaVA masks what it cannot align
            names = {"origin": origin, "template": template, "name": sample["name"]}
            turns = {"conversations": sample["conversations"]}
            kept.append({**names, **turns, "input_ids": ids, "labels": labels})
        else:
            print(f"{template}, {sample['name']}: nothing is learned there, left out")
    lines = ",\n".join(json.dumps(sample) for sample in kept)
    OUT.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
