"""QLoRA beside transformers + bitsandbytes + peft: the same losses."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_training import CONFIG, apart, ours, theirs
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from llava_jax.models.quant import Nf4Weight

DOUBLE = {"nf4": False, "nf4_double": True}
UNTOUCHED = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft 0.21 with transformers 5
    pytest.mark.parity("training", "peft", "bitsandbytes", "transformers"),
]


@pytest.mark.parametrize("kind", [pytest.param("nf4", marks=pytest.mark.slow), "nf4_double"])
def test_twenty_steps_beside_peft_and_bitsandbytes(
    kind: str, saved: Callable, assert_parity: Callable, tmp_path: Path
):
    base = saved("wide")
    config = dataclasses.replace(CONFIG, quantize=kind)
    losses, _, params = ours(config, base, tmp_path / "start")
    quantised = [path for path, leaf in params.items() if isinstance(leaf, Nf4Weight)]
    assert len(quantised) == 7  # stacks: the linears of the decoder's blocks

    hf = LlavaForConditionalGeneration.from_pretrained(
        base,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=DOUBLE[kind],
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=UNTOUCHED,
        ),
    )
    classes = [(name, type(m).__name__) for name, m in hf.named_modules()]
    fewer_bits = [name for name, kind in classes if kind == "Linear4bit"]
    assert len(fewer_bits) == 7 * 3
    assert all("language_model.layers" in n for n in fewer_bits)
    expected = theirs(config, hf, tmp_path / "start")
    assert_parity("losses, relative", apart(losses, expected), 1e-4)
