"""Renders the report of a run as one HTML file without scripts, which needs no other file.

This module computes the values that the report shows; the markup is in `templates/`. Jinja2 escapes
every value that is put into a template, so a question or a path cannot become markup. The only
values that contain markup are the charts, which consist of numbers and fixed titles.
"""

import base64
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llava_jax.disk import read_if_there
from llava_jax.report import formatting
from llava_jax.report.charts import line_chart, smooth, thin
from llava_jax.report.comparison import (
    compare_categories,
    compare_examples,
    compare_measures,
    first_and_last,
    percent_or_dash,
    when,
)
from llava_jax.report.early_stopping import best_row, is_stalled
from llava_jax.report.formatting import NBSP, number, percent, times, width
from llava_jax.report.measures import f1_of, has_long_answers, perplexity
from llava_jax.report.rows import Row, parse_object
from llava_jax.report.run_files import RunFiles
from llava_jax.report.thumbnails import MAX_IMAGES, find_thumbnails

MAX_EXAMPLES = 48
"""Largest number of questions that are shown with their answers."""
MAX_ROWS = 50
"""Largest number of rows in a table of samples; the run's files have all rows."""
LONG_TEXT = 4
"""Number of words from which on an expected answer counts as long."""
RECENT = 10
"""Number of steps over which the training loss at the top of the report is averaged."""

_TEMPLATES = Environment(
    loader=PackageLoader("llava_jax.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "config_value": formatting.config_value,
    "memory": lambda size: formatting.memory(size) if size else "–",
    "number": number,
    "percent": percent,
    "thousands": lambda count: f"{count:,}",
    "times": times,
}


def render(run: RunFiles) -> str:
    """Returns the report of a run as HTML."""
    template = _TEMPLATES.get_template("report.html.j2")
    return template.render(
        run=run,
        max_rows=MAX_ROWS,
        header=_header(run),
        tiles=_tiles(run),
        charts=_charts(run),
        answers=_answers(run),
        result=_result(run),
        memory=_memory(run),
        command=run.described.get("command"),
        recipe=_recipe(run.config, run.described.get("parameters")),
        software=_software(run.described),
    )


def _header(run: RunFiles) -> Row:
    total = run.config["steps"]
    return {
        "name": run.config["name"],
        "done": f"{run.step:,} of {total:,} steps",
        "state": _state(run),
        "started": f"started {run.started:%-d %B %Y, %H:%M} UTC",
        "width": width(run.step / max(total, 1)),
    }


def _state(run: RunFiles) -> str:
    """Says whether the run is finished, and why if it stopped early."""
    if run.step >= run.config["steps"]:
        return "all steps done"
    patience, by = _stop_rule(run.config)
    is_last = bool(run.evaluations) and run.evaluations[-1]["step"] == run.step
    if is_last and is_stalled(run.evaluations, patience, by):
        return f"stopped early after step {run.step:,} (eval.patience)"
    return "not finished yet"


def _stop_rule(config: Row) -> tuple[int | None, str]:
    """Returns eval.patience and eval.best_by. Older versions did not have these fields."""
    group = config.get("eval") or {}
    return group.get("patience"), group.get("best_by", "loss")


def _tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    """Returns the most important numbers of the run, each as a name, a value and a note."""
    columns, tiles = run.columns, []
    if run.evaluations:
        tiles += _eval_tiles(run.evaluations[0], run.evaluations[-1])
    if recent := np.isfinite(columns["loss"][-RECENT:]).sum():
        loss = number(float(np.nanmean(columns["loss"][-RECENT:])))
        tiles.append(("Training loss", loss, f"mean of the last {recent} steps"))
    if len(speed := _speed(run)[np.isfinite(_speed(run))]):
        tokens = f"median; {formatting.amount(np.nansum(columns['tokens']))} tokens in total"
        tiles.append(("Tokens per second", number(round(float(np.median(speed)))), tokens))
        seconds = formatting.duration(float(np.nansum(columns["seconds"])))
        samples = f"in train steps; {formatting.amount(np.nansum(columns['samples']))} samples"
        tiles.append(("Time", seconds, samples))
    if run.device_bytes:
        measured = "of one device, measured"
        tiles.append(("Peak memory", formatting.memory(run.device_bytes), measured))
    return tiles


def _eval_tiles(first: Row, last: Row) -> list[tuple[str, str, str]]:
    """Returns the measures that say most about the model: accuracy, or F1 for long answers."""
    note = lambda text: f"{text} {when(first)}" if last is not first else when(first)
    tile = lambda name, measure: (name, measure(last), note(measure(first)))
    loss = tile("Eval loss", lambda row: number(row["loss"]))
    if not has_long_answers(last):
        return [tile("Eval accuracy", lambda row: percent(row["accuracy"])), loss]
    tiles = [tile("Eval perplexity", lambda row: number(perplexity(row["loss"])))]
    if f1_of(last) is not None:
        count = times(len(last["examples"]), "example")
        tiles.append(tile(f"Token F1, {count}", lambda row: percent_or_dash(f1_of(row))))
    return [*tiles, loss]


def _speed(run: RunFiles) -> np.ndarray:
    """Returns the tokens per second of each step [steps]; NaN where the time is not known."""
    seconds = run.columns["seconds"]
    return run.columns["tokens"] / np.where(seconds > 0, seconds, np.nan)


def _charts(run: RunFiles) -> list[Row]:
    """Returns the charts of the values that change over the steps."""
    columns, steps, rows = run.columns, run.columns["step"], run.evaluations
    eval_steps = np.array([row["step"] for row in rows], float)
    evaluated = lambda name: np.array([row[name] for row in rows], float)  # None becomes NaN
    has_eval = bool(rows) or _eval_data(run.config["data"]) != "none"
    missing = "" if has_eval else "This run has no eval data."
    at_eval = lambda *args, **options: _chart(run, *args, missing=missing, **options)
    if rows and has_long_answers(rows[-1]):
        values = np.array([perplexity(row["loss"]) for row in rows])
        quality = at_eval("Eval perplexity", "per token", eval_steps, values)
    else:
        values = evaluated("accuracy")
        quality = at_eval("Eval accuracy", "exact match", eval_steps, values, in_percent=True)
    return [
        _chart(run, "Loss", "nats per token", steps, columns["loss"], can_be_log=True),
        at_eval("Eval loss", "nats per token", eval_steps, evaluated("loss")),
        quality,
        _chart(run, "Learning rate", "", steps, columns["learning_rate"]),
        _chart(run, "Gradient norm", "before clipping", steps, columns["grad_norm"]),
        _chart(run, "Tokens per second", "all devices", steps, _speed(run)),
    ]


def _chart(
    run: RunFiles,
    title: str,
    unit: str,
    steps: np.ndarray,
    values: np.ndarray,
    *,
    missing: str = "",
    in_percent: bool = False,
    can_be_log: bool = False,
) -> Row:
    """Returns a chart and its caption; the caption of an empty chart says why it is empty.

    With `can_be_log`, the values are also smoothed, and drawn a second time with a logarithmic
    axis; the page shows one of the two charts.
    """
    finite = np.isfinite(values)
    if not finite.any():
        why = "No value was finite." if len(values) else missing or "Nothing was measured."
        return {"title": title, "unit": unit, "svgs": [], "caption": why}
    series = thin(steps, values)
    show = percent if in_percent else number
    only_finite = np.where(finite, values, np.nan)
    lowest, highest = int(np.nanargmin(only_finite)), int(np.nanargmax(only_finite))
    facts = [f"last {show(values[finite][-1])}"]
    if finite.sum() > 1:
        for name, index in (("lowest", lowest), ("highest", highest)):
            facts.append(f"{name} {show(values[index])} (step {int(steps[index]):,})")
    if len(series.marked):
        facts.append(f"▲ {len(series.marked):,} not finite")
    # Line breaks of the caption are allowed between facts, but not inside a fact.
    facts = [fact.replace(" ", NBSP) for fact in facts]
    if len(steps) > len(series.steps):
        facts.append(f"mean and range of {len(steps) // len(series.steps):,} steps per point")
    trend = smooth(series) if can_be_log else None
    if trend is not None:
        facts.append("thick line smoothed")
    last_step = max(run.step, int(steps[-1]))
    logs = (False, True) if can_be_log and (values[finite] > 0).any() else (False,)
    svgs = [
        line_chart(series, title, last_step=last_step, percent=in_percent, log=log, trend=trend)
        for log in logs
    ]
    caption = " · ".join(facts)
    return {"title": title, "unit": unit, "svgs": [*map(Markup, svgs)], "caption": caption}


def _answers(run: RunFiles) -> Row:
    """Returns accuracies and examples of the first and the last evaluation, for comparison."""
    if not run.evaluations:
        has_data = _eval_data(run.config["data"]) != "none"
        return {"why": "Nothing was measured yet." if has_data else "This run has no eval data."}
    rows = first_and_last(run.evaluations)
    names = [when(row).capitalize() for row in rows]
    folder = run.directory / "examples"
    shared = compare_examples(rows)
    cards = [_card([*zip(names, found, strict=True)], folder) for found in shared[:MAX_EXAMPLES]]
    return {
        "why": None,
        "heads": ["Category", "Answers", *names],
        "measures": compare_measures(rows),
        "categories": compare_categories(rows),
        "samples": sum(rows[-1]["samples"].values()),
        "rows": rows,
        "skipped": len(rows[-1].get("skipped") or []),
        "cards": cards,
        "more": max(len(shared) - MAX_EXAMPLES, 0),
    }


def _card(answers: list[tuple[str, Row]], folder: Path) -> Row:
    """Returns one question with its images and its answers, each with the time of the answer."""
    _, example = answers[-1]
    index, images = example.get("index"), example.get("images")
    files = [] if index is None else find_thumbnails(folder, index)
    missing = "This question has no image." if images == 0 else "The image cannot be read."
    return {
        "images": [base64.b64encode(file.read_bytes()).decode() for file in files],
        "missing": "The image was not kept." if images is None else missing,
        "more": max((images or 0) - MAX_IMAGES, 0),
        "question": example["question"],
        "expected": example["expected"],
        "answers": [
            (when, *_judge(answer), answer["given"], bool(answer.get("is_cut")))
            for when, answer in answers
        ],
    }


def _judge(answer: Row) -> tuple[str, str]:
    """Returns a style and a text that say how good an answer is.

    An answer that shares words with a long expected answer is neither right nor wrong; it gets its
    F1. Rows of older versions contain only texts to compare.
    """
    right, f1 = answer.get("right"), answer.get("f1")
    if answer["given"] == answer["expected"] if right is None else right:
        return "right", "✓ right"
    if f1 and len(answer["expected"].split()) >= LONG_TEXT:
        return "near", f"F1 {percent(f1)}"
    return "wrong", "✗ wrong"


def _result(run: RunFiles) -> Row | None:
    """Returns how to use the adapter or the model that the run left; None if it left nothing."""
    directory = str(run.directory)
    shell = shlex.quote(directory)
    if (run.directory / "model").is_dir():
        load = f"model = LlavaForConditionalGeneration.from_pretrained({f'{directory}/model'!r})"
    elif (run.directory / "adapter").is_dir():
        load = _load_adapter(run, directory)
    else:
        return None
    use = {"chat": f"llava-jax chat {shell}", "serve": f"llava-jax serve {shell}", "load": load}
    return use | {"step": _exported_step(run)}


def _exported_step(run: RunFiles) -> str:
    """Says which step's parameters the result has, if that is the best step (keep_best)."""
    by = _stop_rule(run.config)[1]
    best = best_row(run.evaluations, by) if run.config["checkpoint"].get("keep_best") else None
    if best is None:
        return ""
    return f"The result is that of step {best['step']:,}, which has the best eval {by}."


def _load_adapter(run: RunFiles, directory: str) -> str:
    """Returns Python code that loads the adapter with PEFT, or a command that merges it first."""
    settings = read_if_there(run.directory / "adapter" / "adapter_config.json") or b""
    base = (parse_object(settings) or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or base.startswith("llm="):  # PEFT cannot load separate parts
        merged = shlex.quote(f"{directory}-merged")
        return f"llava-jax convert {shlex.quote(directory)} {merged} --to hf --merge"
    model = f"LlavaForConditionalGeneration.from_pretrained({base!r})"
    return f"model = PeftModel.from_pretrained({model}, {f'{directory}/adapter'!r})"


def _memory(run: RunFiles) -> Row:
    """Returns the planned and the measured memory of devices and hosts."""
    if run.device_bytes:
        measured = f"The measured peak of the first device: {formatting.memory(run.device_bytes)}."
    else:
        kinds = ", ".join(sorted(set(run.described["devices"])))
        measured = f"The peak was not measured: {kinds} devices do not report their memory use."
    if run.plan is None:
        return {"text": f"{_manual_plan(run.config)} {measured}", "bars": [], "usage": None}
    usage = run.plan["usage"]
    scale = max(usage["capacity"], usage["total"], run.device_bytes or 0)
    parts = _colored(usage["device"].values())
    parts.append(("reserve", usage["reserve"]))
    bars = [_bar("Device, planned", parts, usage["total"], scale)]
    if run.device_bytes:
        parts = [("measured", run.device_bytes)]
        bars.append(_bar("Device, measured", parts, run.device_bytes, scale))
    if total := usage["host_total"]:
        parts = _colored(usage["host"].values())
        bars.append(_bar("Host, planned", parts, total, max(total, usage["host_capacity"] or 0)))
    return {"text": f"Plan: {run.plan['plan']}. {measured}", "bars": bars, "usage": usage}


def _colored(sizes: Any) -> list[tuple[str, int]]:
    return [(f"t{n}", size) for n, size in enumerate(sizes)]


def _bar(name: str, parts: list[tuple[str, int]], total: int, scale: int) -> Row:
    """Returns a bar of parts (CSS class, bytes), whose full width stands for `scale` bytes."""
    return {
        "name": name,
        "of": f"{formatting.memory(total)} of {formatting.memory(scale)}",
        "parts": [(kind, width(size / scale)) for kind, size in parts if size > 0],
    }


def _manual_plan(config: Row) -> str:
    """Describes the memory settings of a run that has no plan.json."""
    given = config["memory"]
    on = [name.replace("_", " ") for name, value in given.items() if value is True]
    parts = [f"micro-batch {config['batch']['micro_size']}", f"remat {given['remat']}", *on]
    return f"The config sets the plan: {', '.join(parts)}."


def _recipe(config: Row, parameters: Row | None) -> Row:
    """Returns the most important fields of the config, and the number of trainable parameters."""
    tune, batch, rates = config["tune"], config["batch"], config["optimizer"]
    ranks = {"llm": "lora", "vision": "vision_lora", "projector": "lora"}
    lora = lambda name: f", rank {config[name]['rank']}, alpha {config[name]['alpha']:g}"
    trains = [
        f"{part}: {mode}{lora(ranks[part]) if mode == 'lora' else ''}"
        for part, mode in tune.items()
    ]
    mixture = [part["path"] for part in config["data"].get("mixture") or ()]
    quantized = f", base in {config['quantize']}" if config.get("quantize") else ""
    return {
        "Initial weights": formatting.config_value(config["init_from"] or "new weights"),
        "Trained parts": "; ".join(trains),
        **({} if parameters is None else {"Trainable parameters": _of_all(**parameters)}),
        "Data": ", ".join(mixture) or config["data"]["path"],
        "Eval data": _eval_data(config["data"]),
        "Batch": f"{batch['global_size']:,} samples, {config['steps']:,} steps",
        "Learning rate": f"{number(rates['learning_rate'])}, {rates['schedule']}",
        "Compute dtype": config["dtype"] + quantized,
        "Seed": config["seed"],
    }


def _eval_data(data: Row) -> str:
    """Returns the path of the eval data, or the fraction of the training data; or "none"."""
    fraction = data.get("eval_fraction")
    held_out = f"{fraction:.3g} of the training records, held out" if fraction else "none"
    return data["eval_path"] or held_out


def _of_all(trainable: int, total: int) -> str:
    return f"{trainable:,} of {total:,} ({100 * trainable / max(total, 1):.2f} %)"


def _software(described: Row) -> dict[str, str]:
    """Returns the versions of packages, the devices and the fingerprint of the base weights."""
    devices = Counter(described["devices"])
    facts = dict(described["versions"])
    facts["devices"] = ", ".join(f"{count} × {kind}" for kind, count in devices.items())
    if fingerprint := described.get("base_fingerprint"):
        facts["base fingerprint"] = fingerprint
    return facts
