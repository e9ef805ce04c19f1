"""What the presets of real sizes are: the published recipes, and the counts of their parameters."""

from typing import NamedTuple

from llava_jax.config import (
    LLAVA_7B,
    LLAVA_13B,
    LLAVA_LLAMA3_8B,
    LLAVA_NEXT_7B,
    LLAVA_NEXT_34B,
    LLAVA_NEXT_LLAMA3_8B,
    LLAVA_NEXT_MISTRAL_7B,
    ONEVISION_0_5B,
    ONEVISION_7B,
)

SIZES = {
    "7b": LLAVA_7B,
    "13b": LLAVA_13B,
    "llama3_8b": LLAVA_LLAMA3_8B,
    "next_7b": LLAVA_NEXT_7B,
    "next_mistral_7b": LLAVA_NEXT_MISTRAL_7B,
    "next_llama3_8b": LLAVA_NEXT_LLAMA3_8B,
    "next_34b": LLAVA_NEXT_34B,
    "onevision_7b": ONEVISION_7B,
    "onevision_0_5b": ONEVISION_0_5B,
}
WHOLE = {
    "7b": 7_063_427_072,
    "13b": 13_351_494_656,
    "next_7b": 7_063_431_168,
    "next_mistral_7b": 7_566_747_648,
    "onevision_7b": 8_030_807_584,
    "onevision_0_5b": 893_675_552,
}
PROJECTOR = {
    **dict.fromkeys(("7b", "llama3_8b", "next_7b"), 20_979_712),
    **dict.fromkeys(("next_mistral_7b", "next_llama3_8b"), 20_979_712),
    "13b": 31_467_520,
    "next_34b": 58_734_592,
    "onevision_7b": 16_980_992,
    "onevision_0_5b": 1_836_800,
}
CLIP_TOWER, SIGLIP_TOWER = 303_507_456, 397_747_744
# Without the blocks and the norm behind the feature.
CLIP_TRAINED, SIGLIP_TRAINED = CLIP_TOWER - 12_596_224 - 2_048, SIGLIP_TOWER - 2_304
# (size, rank): all seven linears of the decoder.
ADAPTERS = {
    ("7b", 64): 159_907_840,
    ("7b", 128): 319_815_680,
    ("7b", 512): 1_279_262_720,
    ("13b", 64): 250_347_520,
    ("13b", 128): 500_695_040,
    ("13b", 512): 2_002_780_160,
    ("llama3_8b", 64): 167_772_160,
    ("next_7b", 64): 159_907_840,
    ("next_7b", 128): 319_815_680,
    ("next_mistral_7b", 64): 167_772_160,
    ("next_mistral_7b", 128): 335_544_320,
    ("next_llama3_8b", 64): 167_772_160,
    ("next_llama3_8b", 128): 335_544_320,
    ("next_34b", 64): 491_520_000,
    ("onevision_7b", 64): 161_480_704,
    ("onevision_7b", 128): 322_961_408,
    ("onevision_0_5b", 64): 35_192_832,
    ("onevision_0_5b", 128): 70_385_664,
}
# Rank 64 on the four linears of 1024 and the two of 4096 of the 23 blocks before the feature.
VISION_ADAPTERS = 23 * 64 * (4 * 2 * 1024 + 2 * (1024 + 4096))


class Recipe(NamedTuple):
    """What a published run is, in full."""

    tunes: str  # decoder, vision tower; the projector always trains
    rate: float
    projector_rate: float
    rank: int = 0
    alpha: float = 0
    vision_rank: int = 0
    quantize: str | None = None
    batch: int = 128
    loss_group: int = 16  # a GPU's micro-batch there
    clip: float | None = None
    template: str = "vicuna_v1"
    aspect: str = "pad"
    text: int | None = None  # limit of text tokens, beside 2048 in all
    grouped: bool = True
    samples: int = 665_298
    steps: int = 5198
    warmup: int = 156
    vision_rate: float | None = None
    length: int = 2048
    data: str = "llava_v1_5_mix665k.json"


STAGE_1 = {"batch": 256, "loss_group": 32, "aspect": "crop", "grouped": False}
STAGE_1 |= {"samples": 558_128, "steps": 2181, "warmup": 66}
STAGE_1 |= {"data": "blip_laion_cc_sbu_558k.json"}
XTUNER = {"template": "vicuna_xtuner", "text": 1472, "clip": 1.0}
SINGLE = {"template": "llama_3", "loss_group": 1}

FULL = Recipe("full frozen", 2e-5, 2e-5)
LORA = Recipe("lora frozen", 2e-4, 2e-5, 128, 256)
PRETRAIN = Recipe("frozen frozen", 1e-3, 1e-3, **(STAGE_1 | {"template": "plain"}))
LORA_XTUNER = LORA._replace(projector_rate=2e-4, **XTUNER)
PRETRAIN_XTUNER = PRETRAIN._replace(**XTUNER)
QLORA_XTUNER = LORA_XTUNER._replace(
    tunes="lora lora", rank=512, vision_rank=64, quantize="nf4_double"
)

OF_BOTH_SIZES = {
    "pretrain": PRETRAIN,
    "full": FULL,
    "task": FULL,
    "lora": LORA,
    "task_lora": LORA,
    "qlora": LORA._replace(rate=2e-5, rank=64, alpha=16, quantize="nf4_double"),
    "pretrain_xtuner": PRETRAIN_XTUNER,
    "lora_xtuner": LORA_XTUNER,
    "qlora_xtuner": QLORA_XTUNER,
}
RECIPES = {f"{size}_{name}": r for size in ("7b", "13b") for name, r in OF_BOTH_SIZES.items()}
RECIPES |= {
    "7b_full_1gpu": FULL,
    "llama3_8b_pretrain_1gpu": PRETRAIN_XTUNER._replace(**SINGLE),
    "llama3_8b_qlora_1gpu": QLORA_XTUNER._replace(
        tunes="lora frozen", rank=64, alpha=16, vision_rank=0, **SINGLE
    ),
}

NEXT = Recipe("full full", 1e-5, 1e-5, loss_group=4, clip=1.0, vision_rate=2e-6, length=4096)
NEXT = NEXT._replace(data="llava_1_6.json")
NEXT_LORA = NEXT._replace(
    tunes="lora frozen", rate=2e-4, projector_rate=2e-5, rank=128, alpha=256, vision_rate=None
)
QLORA = {"rate": 2e-5, "rank": 64, "alpha": 16, "quantize": "nf4_double"}
NEXT_QLORA = NEXT_LORA._replace(**QLORA)
OF_ONEVISION = {"template": "chatml", "loss_group": 1, "length": 8192, "data": "onevision.json"}
ONEVISION = NEXT._replace(**(OF_ONEVISION | {"length": 32768, "batch": 256, "steps": 2599}))
RECIPES |= {
    "next_7b_full": NEXT,
    "next_7b_task_lora": NEXT_LORA,
    "next_7b_task_qlora": NEXT_QLORA,
    "next_mistral_7b_task_lora": NEXT_LORA._replace(template="mistral_instruct"),
    "next_mistral_7b_task_qlora": NEXT_QLORA._replace(template="mistral_instruct"),
    "next_llama3_8b_task_lora": NEXT_LORA._replace(template="llava_llama_3"),
    "next_llama3_8b_task_qlora": NEXT_QLORA._replace(template="llava_llama_3"),
    "next_34b_task_qlora": NEXT_QLORA._replace(template="chatml_direct"),
    "onevision_7b_pretrain": PRETRAIN._replace(
        batch=512, loss_group=16, clip=1.0, aspect="squash", steps=1091, length=8192
    ),
    "onevision_7b_full": ONEVISION,
    "onevision_0_5b_task": NEXT._replace(**OF_ONEVISION),
}
for size in ("7b", "0_5b"):
    RECIPES[f"onevision_{size}_task_lora"] = NEXT_LORA._replace(**OF_ONEVISION)
    RECIPES[f"onevision_{size}_task_qlora"] = NEXT_QLORA._replace(**OF_ONEVISION)

# Config: its base, and every field in which it differs.
DECODER = {"model", "init_from"}
PROMPT = {"data.template", "data.max_text_length", "optimizer.clip_norm"}
DIFFERENCES = {
    "7b_pretrain": (
        "7b_full",
        {"init_from", "tune.llm", "optimizer.learning_rate"}
        | {"batch.global_size", "batch.loss_group"}
        | {
            f"data.{name}"
            for name in (
                "path",
                "image_root",
                "template",
                "image_aspect",
                "buckets",
                "group_by_modality_length",
            )
        },
    ),
    "7b_lora": (
        "7b_full",
        {"tune.llm", "optimizer.learning_rate", "optimizer.projector_learning_rate"},
    ),
    "7b_qlora": ("7b_lora", {"quantize", "lora.rank", "lora.alpha", "optimizer.learning_rate"}),
    "7b_full_1gpu": ("7b_full", {"checkpoint.keep"}),
    "7b_task": ("7b_full", {"init_from"}),
    "7b_task_lora": ("7b_lora", {"init_from"}),
    "7b_pretrain_xtuner": ("7b_pretrain", PROMPT),
    "7b_lora_xtuner": ("7b_lora", PROMPT | {"init_from", "optimizer.projector_learning_rate"}),
    "7b_qlora_xtuner": ("7b_lora_xtuner", {"quantize", "lora.rank", "tune.vision"}),
    "llama3_8b_pretrain_1gpu": (
        "7b_pretrain_xtuner",
        DECODER | {"data.template", "batch.loss_group"},
    ),
    "llama3_8b_qlora_1gpu": (
        "7b_qlora_xtuner",
        DECODER | {"tune.vision", "lora.rank", "lora.alpha", "data.template", "batch.loss_group"},
    ),
    **{f"13b_{name}": (f"7b_{name}", DECODER) for name in OF_BOTH_SIZES},
}
TO_QLORA = {"quantize", "lora.rank", "lora.alpha", "optimizer.learning_rate"}
RATES = {f"optimizer.{part}learning_rate" for part in ("", "projector_", "vision_")}
DIFFERENCES |= {
    "next_7b_full": (
        "7b_full",
        DECODER
        | {"tune.vision", "data.path", "data.max_length", "data.buckets", "batch.loss_group"}
        | {"optimizer.learning_rate", "optimizer.vision_learning_rate", "optimizer.clip_norm"},
    ),
    "next_7b_task_lora": ("next_7b_full", {"tune.llm", "tune.vision"} | RATES),
    "next_7b_task_qlora": ("next_7b_task_lora", TO_QLORA),
    "next_34b_task_qlora": ("next_7b_task_qlora", DECODER | {"data.template"}),
    "onevision_7b_pretrain": (
        "onevision_7b_full",
        DECODER
        | {"tune.llm", "tune.vision", "batch.global_size", "batch.loss_group"}
        | {"optimizer.learning_rate", "optimizer.vision_learning_rate"}
        | {"data.path", "data.image_root", "data.template", "data.image_aspect"}
        | {"data.max_length", "data.group_by_modality_length"},
    ),
    "onevision_7b_full": (
        "next_7b_full",
        DECODER
        | {"data.path", "data.template", "data.max_length"}
        | {"batch.global_size", "batch.loss_group"},
    ),
    "onevision_7b_task_lora": (
        "onevision_7b_full",
        {"init_from", "tune.llm", "tune.vision", "data.max_length", "batch.global_size"} | RATES,
    ),
    "onevision_7b_task_qlora": ("onevision_7b_task_lora", TO_QLORA),
    "onevision_0_5b_task": (
        "onevision_7b_full",
        DECODER | {"data.max_length", "batch.global_size"},
    ),
}
for kind in ("lora", "qlora"):
    DIFFERENCES |= {
        f"next_{size}_task_{kind}": (f"next_7b_task_{kind}", DECODER | {"data.template"})
        for size in ("mistral_7b", "llama3_8b")
    }
    DIFFERENCES[f"onevision_0_5b_task_{kind}"] = (f"onevision_7b_task_{kind}", DECODER)

HUB = {
    "7b": "llava-1.5-7b-hf",
    "13b": "llava-1.5-13b-hf",
    "next_7b": "llava-v1.6-vicuna-7b-hf",
    "next_mistral_7b": "llava-v1.6-mistral-7b-hf",
    "next_llama3_8b": "llama3-llava-next-8b-hf",
    "next_34b": "llava-v1.6-34b-hf",
    "onevision_7b": "llava-onevision-qwen2-7b-ov-hf",
    "onevision_0_5b": "llava-onevision-qwen2-0.5b-ov-hf",
}
