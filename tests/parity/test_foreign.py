"""Checkpoints that other software wrote: read, converted, and read by transformers, unchanged.

`fixtures/README.md` says what wrote them; `expected.npz` beside each has that software's logits.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_jax.config import parse_source
from llava_jax.convert import convert, open_source
from llava_jax.hf.tensorfile import open_tensors
from llava_jax.lora import LLM, VISION
from llava_jax.pretrained import LlavaModel

IMAGE = 60  # in the fixtures' batches
FIXTURES = Path(__file__).parent / "fixtures"
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
    "I LoRA pickles": ("xtuner_hf/lora_bin", None),
    "PEFT 4.48": ("peft_4_48", "hf_4_48"),
    "PEFT 4.48 pickles": ("peft_4_48_bin", "hf_4_48"),
    "PEFT 4.48 tower": ("peft_4_48_tower", "hf_4_48"),
}
CASES = {name: (source, None) for name, source in WHOLE.items()} | {
    f"{name} on a base": case for name, case in TRAINED.items()
}


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


@pytest.mark.parity("checkpoints", "the software that wrote them")
@pytest.mark.parametrize("name", CASES)
def test_converted_to_hf(
    name: str, batches: dict, hf_logits: Callable, assert_close: Callable, tmp_path: Path
):
    source, base = CASES[name]
    out = tmp_path / "out"
    opened = open_source(parse_source(source), parse_source(base) if base else None, alphas=ALPHAS)
    convert(opened, out, "hf", merge=bool(opened.adapters))
    hf, info = LlavaForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = LlavaModel.from_pretrained(out)
    for batch_name, expected in expected_of(source).items():
        if batch_name not in batches:
            continue
        batch = dict(batches[batch_name])
        ids = batch["input_ids"]
        batch["input_ids"] = np.where(ids == IMAGE, opened.config.image_token_id, ids)
        width = expected.shape[-1]
        assert_close(hf_logits(hf.eval(), batch)[..., :width], expected, batch, case=name)
        inputs = (batch[key] for key in ("input_ids", "pixel_values", "attention_mask"))
        assert_close(np.asarray(ours(*inputs))[..., :width], expected, batch, case=name)
    assert len(open_tensors(out)) == len(hf.state_dict())
