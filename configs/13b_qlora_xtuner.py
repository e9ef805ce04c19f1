"""Same recipe as 7b_qlora_xtuner.py, but for LLaVA-1.5 13B; only the decoder differs.

In XTuner, this recipe does not fit into GPUs with 24 GB (XTuner issue #526).
"""

import dataclasses
from pathlib import Path

from llava_jax.config import LLAVA_13B, load_config

config = dataclasses.replace(
    load_config(Path(__file__).with_name("7b_qlora_xtuner.py")),
    model=LLAVA_13B,
    name="13b_qlora_xtuner",
    init_from="runs/13b_pretrain_xtuner",
)
