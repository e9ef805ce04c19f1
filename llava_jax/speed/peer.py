"""Implements the peer of `llava-jax benchmark --peer hf`: transformers, peft and torch's AdamW."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from llava_jax.speed.case import ADAPTER, BASE, Case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Peer:
    """The side that trains with transformers and peft, like the Trainer of transformers."""

    compile_seconds: float | None = None

    def __init__(self, case: Case, directory: Path):
        config = case.config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        self.ahead = int(self.device != "cpu")
        if self.device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.dtype = DTYPES[config.dtype]
        self.micro_size = config.batch.micro_size or case.samples
        full = config.tune.llm == "full"
        quantised = None
        if config.quantize is not None:
            quantised = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype,
                llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
            )  # fmt: skip
        model: Any = LlavaForConditionalGeneration.from_pretrained(
            directory / BASE,
            dtype=torch.float32 if full else self.dtype,
            attn_implementation="sdpa",
            quantization_config=quantised,
        )
        model.requires_grad_(False)
        if config.tune.llm == "lora":
            import peft

            model = peft.PeftModel.from_pretrained(model, directory / ADAPTER, is_trainable=True)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("vision_tower" not in name)
        if quantised is None:
            model = model.to(self.device)
        if config.memory.remat == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        self.model = model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        recipe = config.optimizer
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=recipe.learning_rate,
            betas=(recipe.b1, recipe.b2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def place(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(batch["input_ids"]).long()
        factors, added = (batch["pixel_scale"][:, i, :, None, None] for i in range(2))
        pixels = batch["pixel_values"][:, 0] * factors + added
        placed = {
            "input_ids": ids,
            "attention_mask": torch.from_numpy(batch["segment_ids"] > 0).long(),
            "labels": ids.masked_fill(~torch.tensor(batch["loss_mask"]), -100),
            "pixel_values": torch.from_numpy(pixels).to(self.dtype),
        }
        return {name: x.to(self.device, non_blocking=True) for name, x in placed.items()}

    def step(self, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
        total = torch.zeros((), device=self.device)
        samples = len(batch["input_ids"])
        for start in range(0, samples, self.micro_size):
            part = {name: x[start : start + self.micro_size] for name, x in batch.items()}
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.model(**part).loss * (len(part["input_ids"]) / samples)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item

    def device_peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None
