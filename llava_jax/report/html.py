"""The HTML of a run's report: one file that needs no other, and no script."""

import base64
import datetime
import html
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.distributed.environment import GIB
from llava_jax.report.charts import line_chart, number, thin
from llava_jax.report.run_files import RunFiles
from llava_jax.report.style import STYLE
from llava_jax.report.thumbnails import MOST, find_pictures

MAX_EXAMPLES = 48
MAX_ROWS = 50
"""Rows of the tables of samples; all are in the run's files."""
NBSP = "\u00a0"
RECENT = 10
"""Steps whose mean stands for the end of a run."""


class Html(str):
    """Text that is markup. All other text is escaped where it is put into a tag."""


def tag(name: str, *inside: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        name: Its name; a class may follow a dot.
        inside: `Html` as it is, else text.
        attributes: None is left out.
    """
    name, _, kind = name.partition(".")
    given = {"class": kind or None} | attributes
    written = "".join(f' {k}="{html.escape(str(v))}"' for k, v in given.items() if v is not None)
    return Html(f"<{name}{written}>{_join(inside)}</{name}>")


def _join(parts: Iterable[Any]) -> Html:
    return Html("".join(p if isinstance(p, Html) else html.escape(str(p)) for p in parts))


def render(run: RunFiles) -> str:
    """The page of a run."""
    sections = (
        ("Course", charts(run)),
        ("Held-out answers", held_out(run)),
        ("Memory", memory(run)),
        ("Samples left out", left_out(run)),
        ("Recipe", recipe(run)),
        ("Software and devices", software(run)),
    )
    name = run.config["name"]
    body = _join(tag("section", tag("h2", title), content) for title, content in sections)
    head = _join(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            # Nothing is fetched, and nothing runs, whatever stands in a question.
            Html('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
                 "img-src data:; style-src 'unsafe-inline'\">"),
            Html('<link rel="icon" href="data:,">'),
            tag("title", f"{name} – llava_jax"),
            Html(f"<style>{STYLE}</style>"),
        ]
    )  # fmt: skip
    page = tag("body", tag("main", header(run), headline(run), body))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n{page}</html>\n'


def header(run: RunFiles) -> Html:
    """Which run it is, and how far."""
    total = run.config["steps"]
    done = f"{run.step:,} of {total:,} steps"
    state = "all steps done" if run.step >= total else "not finished when this was written"
    now = datetime.datetime.now(datetime.UTC)
    return tag(
        "header",
        tag("p.kind", "llava_jax training run"),
        tag("h1", run.config["name"]),
        tag("p.status", tag("strong", done), f" · {state} · {now:%-d %B %Y, %H:%M} UTC"),
        *(tag("p.note", line) for line in run.damaged),
        tag("div.progress", tag("i", style=f"width:{_percent(run.step / max(total, 1))}")),
    )


def headline(run: RunFiles) -> Html:
    """The few numbers that matter most."""
    c, tiles = run.columns, []
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        then = lambda text: f"{text} {_when(first)}" if last is not first else _when(first)
        tiles += [
            ("Held-out accuracy", _share(last["accuracy"]), then(_share(first["accuracy"]))),
            ("Held-out loss", _maybe(last["loss"]), then(_maybe(first["loss"]))),
        ]
    if recent := np.isfinite(c["loss"][-RECENT:]).sum():
        loss = number(float(np.nanmean(c["loss"][-RECENT:])))
        tiles.append(("Training loss", loss, f"mean of the last {recent} steps"))
    if len(speed := _speed(run)[np.isfinite(_speed(run))]):
        tokens = f"median; {_amount(np.nansum(c['tokens']))} tokens in all"
        tiles.append(("Tokens a second", number(round(float(np.median(speed)))), tokens))
        seen = f"in steps; {_amount(np.nansum(c['samples']))} samples"
        tiles.append(("Time", _duration(float(np.nansum(c["seconds"]))), seen))
    if run.device_bytes:
        tiles.append(("Peak memory", _bytes(run.device_bytes), "of a device, measured"))
    return tag(
        "dl.tiles",
        *(tag("div", tag("dt", a), tag("dd", b), tag("dd.note", c)) for a, b, c in tiles),
    )


def charts(run: RunFiles) -> Html:
    """All that changes over steps."""
    c, steps = run.columns, run.columns["step"]
    rows = run.evaluations
    at = np.array([row["step"] for row in rows], float)
    measured = lambda name: (at, np.array([row[name] for row in rows], float))  # None is NaN
    drawn = [
        _chart("Loss", "nats a token", run, steps, c["loss"]),
        _chart("Held-out loss", "nats a token", run, *measured("loss")),
        _chart("Held-out accuracy", "exact match", run, *measured("accuracy"), percent=True),
        _chart("Learning rate", "", run, steps, c["learning_rate"]),
        _chart("Gradient norm", "before clipping", run, steps, c["grad_norm"]),
        _chart("Tokens a second", "all devices", run, steps, _speed(run)),
    ]
    return tag("div.charts", *drawn)


def _chart(
    title: str,
    unit: str,
    run: RunFiles,
    steps: np.ndarray,
    values: np.ndarray,
    *,
    percent: bool = False,
) -> Html:
    heading = tag("h3", title, " ", tag("small", unit))
    kept = np.isfinite(values)
    if not kept.any():
        why = "No value was finite." if len(values) else "Nothing was measured."
        if not len(values) and title.startswith("Held-out") and not run.config["data"]["eval_path"]:
            why = "This run has no held-out data."
        return tag("figure", heading, tag("p.nothing", why))
    series = thin(steps, values)
    show = _share if percent else number
    lowest, highest = (int(steps[f(values)]) for f in (np.nanargmin, np.nanargmax))
    least, most = np.nanmin(values[kept]), np.nanmax(values[kept])
    facts = [f"last {show(values[kept][-1])}"]
    if kept.sum() > 1:
        facts += [f"lowest {show(least)} (step {lowest:,})"]
        facts += [f"highest {show(most)} (step {highest:,})"]
    if len(series.marked):
        facts.append(f"▲ {len(series.marked):,} not finite")
    facts = [fact.replace(" ", NBSP) for fact in facts]
    if len(steps) > len(series.steps):
        facts.append(f"means of {len(steps) // len(series.steps):,} steps, and their range")
    last = max(run.step, int(steps[-1]))
    svg = line_chart(series, title, last_step=last, percent=percent)
    return tag("figure", heading, Html(svg), tag("figcaption", " · ".join(facts)))


def held_out(run: RunFiles) -> Html:
    """What was answered before and after."""
    if not run.evaluations:
        has_data = run.config["data"]["eval_path"]
        why = "Nothing was measured yet." if has_data else "This run has no held-out data."
        return tag("p.nothing", why)
    before, after = run.evaluations[0], run.evaluations[-1]
    rows = [before] if before is after else [before, after]
    parts = [_categories(rows)]
    if skipped := len(after.get("skipped", [])):
        parts.append(tag("p", f"{_times(skipped, 'held-out sample')} cannot be used."))
    given = [{_key(e): e for e in row["examples"]} for row in rows]
    shared = [e for e in rows[-1]["examples"] if all(_key(e) in g for g in given)]
    folder = run.directory / "examples"
    columns = [(_when(row).capitalize(), answers) for row, answers in zip(rows, given, strict=True)]
    cards = [
        _card(example, [(when, answers[_key(example)]) for when, answers in columns], folder)
        for example in shared[:MAX_EXAMPLES]
    ]
    if cards:
        note = "An answer that departs from what was expected ends with the first token that does."
        parts += [tag("h3", "Examples"), tag("p.note", note), tag("div.cards", *cards)]
    if len(shared) > MAX_EXAMPLES:
        parts.append(tag("p.note", f"{len(shared) - MAX_EXAMPLES:,} more: evaluations.jsonl"))
    return _join(parts)


def _key(example: dict[str, Any]) -> Any:
    """Tells an example from others, also if the data changed while the run was stopped."""
    return example.get("index"), example["question"], example["expected"]


def _categories(rows: Sequence[dict[str, Any]]) -> Html:
    last = rows[-1]["samples"]
    heads = ["Questions", "Samples", *(_when(row).capitalize() for row in rows)]
    shown = sorted(last) if len(last) > 1 else []
    cell = lambda right, count: tag("td.n", _share(right / count) if count else "–")
    lines = [
        tag("tr", tag("td", name), tag("td.n", f"{last[name]:,}"),
            *(cell(row["exact"].get(name, 0), row["samples"].get(name, 0)) for row in rows))
        for name in shown
    ]  # fmt: skip
    total = tag("tr.total", tag("td", "all"), tag("td.n", f"{sum(last.values()):,}"),
                *(tag("td.n", _share(row["accuracy"])) for row in rows))  # fmt: skip
    loss = tag("tr", tag("td", "loss, nats a token"), tag("td"),
               *(tag("td.n", _maybe(row["loss"])) for row in rows))  # fmt: skip
    caption = tag("caption", "Answered to the letter by greedy decoding")
    return _table(heads, [*lines, total, loss], numbers=1, caption=caption)


def _card(example: dict[str, Any], given: list[tuple[str, dict[str, Any]]], folder: Path) -> Html:
    index, count = example.get("index"), example.get("images")
    files = [] if index is None else find_pictures(folder, index)
    pictures = [
        Html(
            f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(f.read_bytes()).decode()}">'
        )
        for f in files
    ]
    if not pictures:
        missing = "no picture in this question" if count == 0 else "its picture cannot be read"
        pictures = [tag("p.nothing", "picture not kept" if count is None else missing)]
    if count is not None and count > MOST:
        pictures.append(tag("p.note", f"and {count - MOST} more"))
    lines = [("Expected", Html(""), example["expected"], None)]
    for when, answer in given:
        right = answer.get("right")
        right = answer["given"] == answer["expected"] if right is None else right
        mark = tag("b.right", "✓ right") if right else tag("b.wrong", "✗ wrong")
        lines.append((when, mark, answer["given"], right))
    return tag(
        "article",
        tag("div.pictures", *pictures),
        tag("p.question", example["question"]),
        tag("dl", *(_answer(*line) for line in lines)),
    )


def _answer(name: str, mark: Html, text: str, right: bool | None) -> Html:
    text = text if text else tag("i", "nothing")
    return tag("div", tag("dt", name, " ", mark), tag("dd", text))


def memory(run: RunFiles) -> Html:
    """What the plan takes of a device and of host memory, and what was measured."""
    if run.device_bytes:
        measured = f"Measured peak of the first device: {_bytes(run.device_bytes)}."
    else:
        kinds = ", ".join(sorted(set(run.described["devices"])))
        measured = f"Peak not measured: devices of the kind {kinds} do not tell what is in use."
    bars, table = [], Html("")
    if run.plan is None:
        planned = _given_plan(run.config)
    else:
        planned, usage = f"Plan: {run.plan['plan']}.", run.plan["usage"]
        scale = max(usage["capacity"], usage["total"], run.device_bytes or 0)
        parts = list(usage["device"].values())
        bars.append(_bar("Device, planned", parts, scale, usage["total"], usage["reserve"]))
        if run.device_bytes:
            bars.append(_bar("Device, measured", [run.device_bytes], scale, run.device_bytes))
        if usage["host_total"]:
            parts, host = list(usage["host"].values()), usage["host_total"]
            bars.append(_bar("Host, planned", parts, max(host, usage["host_capacity"] or 0), host))
        table = _terms(usage)
    return _join([tag("p", f"{planned} {measured}"), tag("div.bars", *bars), table])


def _given_plan(config: dict[str, Any]) -> str:
    given = config["memory"]
    if given["plan"] == "auto":
        return (
            "No plan was made: the device does not tell its memory (memory.limit_gib declares it)."
        )
    on = [name.replace("_", " ") for name, value in given.items() if value is True]
    parts = [f"micro-batch {config['batch']['micro_size']}", f"remat {given['remat']}", *on]
    return f"Plan as the config gives it (memory.plan manual): {', '.join(parts)}."


def _bar(name: str, parts: list[int], scale: int, total: int, reserve: int = 0) -> Html:
    """A bar of terms, in a track that is as long as the memory that there is."""
    kinds = ["measured"] if len(parts) == 1 else [f"t{n}" for n in range(len(parts))]
    pieces = [
        tag(f"i.{kind}", style=f"width:{_percent(part / scale)}")
        for kind, part in zip(kinds, parts, strict=True)
        if part > 0
    ]
    kept = tag("i.reserve", style=f"width:{_percent(reserve / scale)}") if reserve else Html("")
    of = f"{_bytes(total)} of {_bytes(scale)}"
    return tag("div", tag("p", name, " ", tag("span", of)), tag("div.bar", *pieces, kept))


def _terms(usage: dict[str, Any]) -> Html:
    cell = lambda value: tag("td.n", _bytes(value) if value else "–")
    row = lambda name, key, device, host: tag("tr", tag("td", key, name), cell(device), cell(host))
    lines = [
        row(term, tag(f"i.key t{n}"), size, usage["host"][term])
        for n, (term, size) in enumerate(usage["device"].items())
    ]
    lines.append(row("sum", Html(""), usage["total"], usage["host_total"]))
    lines.append(row("kept free for the runtime", tag("i.key reserve"), usage["reserve"], 0))
    lines.append(row("memory", Html(""), usage["capacity"], usage["host_capacity"]))
    return _table(["A device takes", "Device", "Host"], lines, numbers=1)


def left_out(run: RunFiles) -> Html:
    """Samples that could not be used, and steps that changed nothing."""
    parts = []
    if run.skipped:
        names = ("step", "place", "reason")
        lines = [
            tag("tr", *(tag("td", row.get(name, "")) for name in names))
            for row in run.skipped[:MAX_ROWS]
        ]
        parts += [tag("p", f"{_times(len(run.skipped), 'sample')} cannot be used.")]
        parts += [_table(["First at step", "Sample", "Why"], lines), _more(run.skipped, "skipped")]
    else:
        parts.append(tag("p", "No sample was left out."))
    if run.nonfinite:
        lines = [
            tag("tr", tag("td", row["step"]), tag("td", "; ".join(row.get("samples", []))))
            for row in run.nonfinite[:MAX_ROWS]
        ]
        said = (
            f"{_times(len(run.nonfinite), 'step')} had a loss or gradients that were not finite; "
        )
        parts += [tag("p", said, "their updates are left out.")]
        parts += [_table(["Step", "Its samples"], lines), _more(run.nonfinite, "nonfinite")]
    else:
        parts.append(tag("p", "Every step was finite."))
    return _join(parts)


def _more(rows: Sequence[Any], name: str) -> Html:
    more = len(rows) - MAX_ROWS
    return tag("p.note", f"{more:,} more: {name}.jsonl") if more > 0 else Html("")


def recipe(run: RunFiles) -> Html:
    """What is learned, in short and in full."""
    c = run.config
    tune, batch, rates = c["tune"], c["batch"], c["optimizer"]
    lora = lambda name: f", rank {c[name]['rank']}, alpha {c[name]['alpha']:g}"
    kinds = {"llm": "lora", "vision": "vision_lora"}
    trains = [
        f"{part}: {kind}{lora(kinds[part]) if kind == 'lora' else ''}"
        for part, kind in tune.items()
    ]
    mixture = [part["path"] for part in c["data"].get("mixture") or ()]
    facts = {
        "Starts from": _value(c["init_from"] or "new weights"),
        "Trains": "; ".join(trains),
        "Data": ", ".join(mixture) or c["data"]["path"],
        "Held-out data": c["data"]["eval_path"] or "none",
        "Batch": f"{batch['global_size']:,} samples, {c['steps']:,} steps",
        "Learning rate": f"{number(rates['learning_rate'])}, {rates['schedule']}",
        "Computed in": c["dtype"] + (f", on {c['quantize']}" if c.get("quantize") else ""),
        "Seed": c["seed"],
    }
    lines = [tag("tr", tag("th", name, scope="row"), tag("td", x)) for name, x in facts.items()]
    summary = tag("summary", "Every field of the config")
    return _join([_table([], lines), tag("details", summary, _fields(c))])


def _fields(config: dict[str, Any]) -> Html:
    """A table of fields; groups of fields are tables in it."""
    lines = []
    for name, value in config.items():
        if isinstance(value, dict):
            group = tag("details", tag("summary", name), _fields(value), open="")
            lines.append(tag("tr", tag("td.group", group, colspan=2)))
        else:
            broken = Html(html.escape(name).replace("_", "_<wbr>"))
            lines.append(tag("tr", tag("th", broken, scope="row"), tag("td", _value(value))))
    return _table([], lines, kind="fields")


def _value(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value) or "none"
    return value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def software(run: RunFiles) -> Html:
    """Versions, devices, the base's fingerprint."""
    devices = Counter(run.described["devices"])
    facts = dict(run.described["versions"])
    facts["devices"] = ", ".join(f"{count} × {kind}" for kind, count in devices.items())
    if fingerprint := run.described.get("base_fingerprint"):
        facts["base's fingerprint"] = fingerprint
    lines = [tag("tr", tag("th", name, scope="row"), tag("td", x)) for name, x in facts.items()]
    return _table([], lines)


def _table(
    heads: Sequence[str],
    lines: Sequence[Html],
    *,
    numbers: int | None = None,
    caption: Html | None = None,
    kind: str | None = None,
) -> Html:
    """A table that scrolls by itself where it is too wide; from a column on, heads of numbers."""
    first = len(heads) if numbers is None else numbers
    cells = [tag("th" if n < first else "th.n", h, scope="col") for n, h in enumerate(heads)]
    head = tag("thead", tag("tr", *cells)) if heads else Html("")
    table = tag("table", caption or Html(""), head, tag("tbody", *lines), **{"class": kind})
    return tag("div.table", table)


def _when(row: dict[str, Any]) -> str:
    return "before" if row["step"] == 0 else f"after {_times(row['step'], 'step')}"


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _speed(run: RunFiles) -> np.ndarray:
    seconds = run.columns["seconds"]
    return run.columns["tokens"] / np.where(seconds > 0, seconds, np.nan)


def _share(value: float | int) -> str:
    return f"{100 * value:.1f} %"


def _maybe(value: float | int | None) -> str:
    return "not finite" if value is None else number(value)


def _percent(share: float | int) -> str:
    return f"{100 * min(max(share, 0), 1):.2f}%"


def _amount(count: float | int) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,.0f}"


def _bytes(size: float | int) -> str:
    return f"{size / GIB:.2f}{NBSP}GiB" if size >= GIB else f"{size / 2**20:.1f}{NBSP}MiB"


def _duration(seconds: float | int) -> str:
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s"
    hours, minutes = int(seconds) // 3600, int(seconds) // 60 % 60
    if not hours:
        return f"{minutes}{NBSP}min {int(seconds) % 60}{NBSP}s"
    return f"{hours:,}{NBSP}h" + (f" {minutes}{NBSP}min" if hours < 100 else "")
