"""Writes the model card of a run's result: a README.md for people and for the Hugging Face Hub."""

import math
from collections.abc import Sequence
from pathlib import Path

from llava_jax.config import TrainConfig, flatten, parse_source, to_json
from llava_jax.pretrained.resolve import is_local, model_name
from llava_jax.report.early_stopping import best_row
from llava_jax.report.rows import Row

_RECIPE = (
    *("tune", "lora", "vision_lora", "quantize", "dtype", "seed"),
    *("batch.global_size", "batch.loss_weighting", "optimizer"),
    *("data.template", "data.image_aspect", "data.max_length"),
)
"""Fields and groups of the config that the table of the recipe shows."""

UNNAMED = "PATH/OF/THIS/DIRECTORY"
"""Text in a model card that stands for the directory, or for the repository, of the result."""


def model_card(
    config: TrainConfig,
    base: str | None,
    steps: int,
    samples: tuple[int, int],
    rows: Sequence[Row],
    best: int | None = None,
) -> str:
    """Returns the text of the README.md, in Markdown with metadata in YAML.

    The text contains no path of this machine.

    Args:
        config: Config of the run.
        base: Name of the base model: hub id, path or parts. None if there is no base model.
        steps: Number of optimizer steps of the run.
        samples: Number of training samples and number of eval samples.
        rows: Rows of evaluations.jsonl, in the order of their steps.
        best: Step whose parameters the result has; None if it has those of the last step.
    """
    has_adapter = config.tune.has_adapters
    on_hub = base is not None and "/" in base and not is_local(base) and not Path(base).exists()
    named = None if base is None else model_name(parse_source(base))
    title = f"{'LoRA adapter' if has_adapter else 'model'} that was trained with llava_jax"
    origin = f", starting from {named}" if named else ""
    kept = "" if best is None else f" It has the parameters of step {best:,}, the best evaluation."
    text = [
        _metadata(base if on_hub else None, has_adapter=has_adapter),
        f"# {config.name}\n",
        f"This is a {title}{origin}: {steps:,} steps on {samples[0]:,} samples.{kept}\n",
        _scores(config, rows, samples[1]),
        _usage(config, base if on_hub else None, has_adapter=has_adapter),
        _recipe(config),
        "## License\n",
        "No license is set. Choose a license that the licenses of the base model and of the data",
        "allow, and add it to the metadata at the top of this file (`license: ...`).\n",
    ]
    return "\n".join(text)


def _metadata(base: str | None, *, has_adapter: bool) -> str:
    """Returns the metadata that the hub reads."""
    lines = [
        *([f"base_model: {base}"] if base else []),
        f"library_name: {'peft' if has_adapter else 'transformers'}",
        "pipeline_tag: image-text-to-text",
        f"tags: [llava, llava_jax{', lora' if has_adapter else ''}]",
    ]
    return "\n".join(["---", *lines, "---\n"])


def _scores(config: TrainConfig, rows: Sequence[Row], samples: int) -> str:
    """Returns the section with the first, the best and the last evaluation."""
    if not rows:
        return "The run had no eval data, so there are no scores.\n"
    best = best_row(rows, config.eval.best_by)
    chosen = {row["step"]: row for row in (rows[0], best or rows[-1], rows[-1])}
    lines = [
        f"| {step:,} | {_loss(row):.4f} | {100 * row['accuracy']:.1f} % |"
        for step, row in sorted(chosen.items())
    ]
    head = ["| step | eval loss | exact answers |", "|---:|---:|---:|"]
    held_out = config.data.eval_path is None and config.data.eval_fraction > 0
    origin = "held out from the training data" if held_out else "from the eval data of the run"
    text = f"On {samples:,} samples {origin}:\n"
    return "\n".join(["## Scores\n", text, *head, *lines, ""])


def _loss(row: Row) -> float:
    """Returns the eval loss of a row; NaN if it is not finite."""
    return math.nan if row["loss"] is None else row["loss"]


def _usage(config: TrainConfig, base: str | None, *, has_adapter: bool) -> str:
    """Returns the section that says how to load the result."""
    here, base = config.push_to_hub or UNNAMED, base or "PATH/OF/THE/BASE/MODEL"
    model = f'model = LlavaForConditionalGeneration.from_pretrained("{here}")'
    imports = "from transformers import AutoProcessor, LlavaForConditionalGeneration"
    if has_adapter:
        imports = f"from peft import PeftModel\n{imports}"
        model = f'base = LlavaForConditionalGeneration.from_pretrained("{base}")'
        model += f'\nmodel = PeftModel.from_pretrained(base, "{here}")'
    return f"""\
## Use

With llava_jax:

```bash
llava-jax chat {here} --image cat.jpg
```

With transformers{" and PEFT" if has_adapter else ""}:

```python
{imports}

{model}
processor = AutoProcessor.from_pretrained("{here}")
```
"""


def _recipe(config: TrainConfig) -> str:
    """Returns the section with the table of the recipe."""
    tune = config.tune
    is_used = {"lora": "lora" in (tune.llm, tune.projector), "vision_lora": tune.vision == "lora"}
    shown = [field for field in _RECIPE if is_used.get(field, True)]
    text = lambda value: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    in_table = lambda value: text(value).replace("|", "\\|")  # a pattern may contain a bar
    lines = [
        f"| `{in_table(name)}` | {in_table(value)} |"
        for name, value in flatten(to_json(config)).items()
        if any(f"{name}.".startswith(f"{field}.") for field in shown) and value is not None
    ]
    return "\n".join(["## Recipe\n", "| field | value |", "|---|---|", *lines, ""])
