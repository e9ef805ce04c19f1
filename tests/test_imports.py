"""Who may import whom: a lower level never imports a higher one, and importing runs no JAX."""

import ast
import builtins
import dis
import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llava_jax"

# The picture of docs/architecture.md. A module may import its own level and those below.
LEVELS = (
    (
        "config",
        "devices",
        "disk",
        "environment",
        "guard",
        "hlo",
        "lock",
        "metrics",
        "page",
        "page_style",
        "pictures",
        "processes",
        "profiler",
        "quant",
        "rendezvous",
        "sampling",
        "repair",
        "report",
        "rows",
        "run_files",
        "stop",
        "svg",
        "trackers",
        "data.conversation",
        "data.errors",
        "data.files",
        "data.image_file",
        "data.image_limits",
        "data.images",
        "data.order",
        "data.workers",
        "hf.layouts",
        "hf.limited",
        "hf.tensorfile",
        "models.flash",
        "benchmarks.answers",
        "serving.access",
        "serving.bodies",
        "serving.connections",
        "serving.decoder",
        "serving.fetch",
        "serving.images",
        "serving.limits",
        "serving.metrics",
        "serving.page_guard",
        "serving.schema",
        "serving.uploads",
    ),
    (
        "collectives",
        "flops",
        "host",
        "needed",
        "models.layers",
        "data.packing",
        "data.records",
        "data.easy_vqa",
        "hf.official",
        "hf.pickles",
        "hf.zero",
        "hf.anyfile",
        "benchmarks.questions",
    ),
    (
        "sharding",
        "update",
        "models.attention",
        "models.stack",
        "data.json_file",
        "data.parquet_file",
        "data.padding",
        "benchmarks.metrics",
        "benchmarks.pope",
        "benchmarks.mme",
        "benchmarks.scienceqa",
        "benchmarks.textvqa",
        "benchmarks.gqa",
        "benchmarks.vqav2",
        "benchmarks.mmbench",
    ),
    (
        "models.llama",
        "models.vision",
        "data.sources",
        "data.digest",
        "data.batching",
        "data.check",
        "benchmarks.own",
    ),
    ("models.llava", "benchmarks.tasks"),
    ("lora", "loss", "models.cached"),
    (
        "optim",
        "hf.weights",
        "hf.weights_save",
        "hf.model_config",
        "hf.tokenizer",
        "hf.processor",
        "hf.peft",
    ),
    ("hf.trained", "hf.resolve", "hf.official_save"),
    ("step", "inputs", "pretrained", "description", "prompts"),
    ("program", "evaluation", "journal", "convert", "generation", "serving.conversation"),
    ("export", "checkpoint", "plan", "plan_cache", "merge_check", "part", "assistant"),
    (
        "agreement",
        "run",
        "train",
        "chat",
        "options",
        "benchmarks.asking",
        "benchmarks.lmms",
        "serving.engine",
        "serving.service",
        "serving.app",
        "serving.page",
    ),
)
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}


def imported(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llava_jax"):
            inside = (node.module or "").removeprefix("llava_jax").removeprefix(".")
            parts = [f"{inside}.{alias.name}".strip(".") for alias in node.names]
            names |= {part for part in parts if part in LEVEL} or {inside}
    return names


def test_every_module_has_a_level():
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py"]
    modules = {".".join(f.relative_to(PACKAGE).with_suffix("").parts) for f in files}
    assert modules == set(LEVEL)


def test_the_picture_is_the_table():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    drawn = [(int(level), set(modules.split(", "))) for level, modules in rows]
    assert drawn == [(level, set(modules)) for level, modules in enumerate(LEVELS)]
    missing = [m for m in LEVEL if not re.search(rf"\b{m.rsplit('.', 1)[-1]}\.py\b", text)]
    assert missing == []


def test_no_module_imports_a_higher_one():
    wrong = [
        f"{module} imports {other}"
        for module in LEVEL
        for other in imported(module)
        if LEVEL[other] > LEVEL[module]
    ]
    assert wrong == []


PICKLES = ("hf.pickles", "hf.anyfile", "hf.zero", "convert")


def test_only_conversion_imports_what_reads_pickles():
    reads = {module for module in LEVEL if imported(module) & set(PICKLES)}
    assert reads == {"hf.anyfile", "hf.zero", "convert", "merge_check", "part"}


def test_nothing_else_imports_what_serves():
    others = [module for module in LEVEL if not module.startswith("serving.")]
    assert {name for module in others for name in imported(module) if "serving" in name} == set()
    of_extra = re.compile(r"^\s*(?:import|from) (fastapi|uvicorn|gradio|pydantic|prometheus)", re.M)
    sources = {module: PACKAGE / (module.replace(".", "/") + ".py") for module in others}
    assert [m for m, file in sources.items() if of_extra.search(file.read_text())] == []


@pytest.mark.parametrize(
    "program",
    [
        "import llava_jax.training.run, llava_jax; llava_jax.LlavaModel",
        "import runpy; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('llava_jax.train', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "else: raise AssertionError",
    ],
)
def test_training_does_not_load_what_reads_pickles(program):
    names = [f"llava_jax.{module}" for module in PICKLES]
    check = f"loaded = {{*{names}, 'torch', 'pickletools'}} & {{*sys.modules}}; assert not loaded"
    subprocess.run([sys.executable, "-c", f"import sys\n{program}\n{check}, loaded"], check=True)


COMMANDS = [
    ["-m", "llava_jax.train"],
    ["-m", "llava_jax.train", "--config", "configs/7b_lora.py"],
    *(
        [str(file)]
        for file in sorted((PACKAGE.parent / "tools").glob("*.py"))
        if "ArgumentParser(" in file.read_text()
    ),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_does_not_wait_for_jax(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert done.stdout.startswith("usage: ")
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert imported.isdisjoint({"jax", "flax", "grain", "orbax", "torch"})


def loaded_globals(code: types.CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [loaded_globals(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return names.union(*inner)


NEEDS = {
    "benchmarks.lmms": "lmms_eval.api",
    "serving.access": "fastapi",
    "serving.app": "fastapi",
    "serving.bodies": "fastapi",
    "serving.connections": "httptools",
    "serving.fetch": "fastapi",
    "serving.images": "fastapi",
    "serving.limits": "fastapi",
    "serving.page": "fastapi",
    "serving.page_guard": "fastapi",
    "serving.uploads": "fastapi",
    "serving.schema": "pydantic",
    "serving.conversation": "pydantic",
    "serving.metrics": "prometheus_client",
    "serving.service": "prometheus_client",
}
"""What modules need that the tests do not."""


@pytest.mark.parametrize("module", LEVEL)
def test_every_name_is_defined(module):
    """The linter cannot tell: jaxtyping's shapes are names to it."""
    file = PACKAGE / (module.replace(".", "/") + ".py")
    code = compile(file.read_text(), str(file), "exec")
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    known = dir(importlib.import_module(f"llava_jax.{module}")) + dir(builtins)
    assert loaded_globals(code) <= set(known)


def test_only_the_public_model_needs_jax_and_no_import_runs_it():
    programs = (
        "import sys, llava_jax, llava_jax.config; assert 'jax' not in sys.modules",
        "import sys, llava_jax.run, jax\n"
        "assert not jax._src.xla_bridge.backends_are_initialized()\n"
        "assert 'torch' not in sys.modules",
    )
    for program in programs:
        subprocess.run([sys.executable, "-c", program], check=True)
