"""Who may import whom, how large files may be, and that importing runs no JAX."""

import ast
import builtins
import dis
import importlib
import re
import subprocess
import sys
import textwrap
import tomllib
import types
from pathlib import Path

import pytest

from llava_jax.cli import main

PACKAGE = Path(__file__).parent.parent / "llava_jax"

MODULES = sorted(
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if file.name != "__init__.py"
)
MAX_LINES, MAX_FUNCTION_LINES, MAX_ANY = 450, 80, 250


def test_rooms_import_lower_lines_only():
    """The contract stands in pyproject.toml; docs/architecture.md shows it."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_docs_show_the_contract_and_every_file():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    layers = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    contract = layers["tool"]["importlinter"]["contracts"][0]["layers"]
    assert "\n".join(f"    {line}" for line in contract) in text
    tree = subprocess.run(
        [sys.executable, PACKAGE.parent / "tools" / "file_tree.py"], capture_output=True, text=True
    ).stdout
    assert all(m.rsplit(".", 1)[-1] + ".py" in tree for m in MODULES)
    assert textwrap.indent(tree, " " * 4) in text


def test_rooms_stay_small():
    long = [m for m in MODULES if len(source_of(m).read_text().splitlines()) > MAX_LINES]
    assert long == []
    loose = [m for m in MODULES if "." not in m]
    assert len(loose) <= 8, loose


def test_functions_stay_short():
    """Ruff keeps their complexity (C901), and can count statements only."""
    lengths = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in MODULES
        for node in ast.walk(ast.parse(source_of(module).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_types_are_named():
    found = [m for m in MODULES for _ in re.findall("Any", source_of(m).read_text())]
    assert len(found) <= MAX_ANY


def source_of(module: str) -> Path:
    return PACKAGE / (module.replace(".", "/") + ".py")


def imported(module: str) -> set[str]:
    tree = ast.parse(source_of(module).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llava_jax"):
            inside = (node.module or "").removeprefix("llava_jax").removeprefix(".")
            parts = [f"{inside}.{alias.name}".strip(".") for alias in node.names]
            names |= {part for part in parts if part in MODULES} or {inside}
    return names


PICKLES = (
    *("conversion.safe_unpickler", "conversion.torch_pickle"),
    *("conversion.tensor_formats", "conversion.deepspeed"),
)


def test_only_conversion_imports_what_reads_pickles():
    others = [module for module in MODULES if not module.startswith("conversion.")]
    assert [module for module in others if imported(module) & set(PICKLES)] == []


def test_nothing_else_imports_what_serves():
    others = [m for m in MODULES if not m.startswith("serving.") and m != "cli.serve"]
    assert {name for module in others for name in imported(module) if "serving" in name} == set()
    of_extra = re.compile(r"^\s*(?:import|from) (fastapi|uvicorn|gradio|pydantic|prometheus)", re.M)
    sources = {module: source_of(module) for module in others}
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
    ["-m", "llava_jax"],
    *(["-m", "llava_jax", name] for name in main.COMMANDS),
    *(
        [str(file.relative_to(PACKAGE.parent))]
        for file in sorted((PACKAGE.parent / "tools").glob("*.py"))
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
    if command[0] == "-m":  # what users type, and not what only developers do
        assert imported.isdisjoint({"transformers", "huggingface_hub", "matplotlib", "fastapi"})


def loaded_globals(code: types.CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [loaded_globals(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return names.union(*inner)


NEEDS = {
    "speed.peer": "torch",
    "evals.lmms_eval": "lmms_eval.api",
    "serving.access": "fastapi",
    "serving.app": "fastapi",
    "serving.bodies": "fastapi",
    "serving.connections": "httptools",
    "serving.fetch": "fastapi",
    "serving.images": "fastapi",
    "serving.limits": "fastapi",
    "serving.web_page": "fastapi",
    "serving.page_guard": "fastapi",
    "serving.uploads": "fastapi",
    "serving.schema": "pydantic",
    "serving.conversation": "pydantic",
    "serving.prometheus": "prometheus_client",
    "serving.service": "prometheus_client",
}
"""What modules need that the tests do not."""


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_defined(module):
    """The linter cannot tell: jaxtyping's shapes are names to it."""
    file = source_of(module)
    code = compile(file.read_text(), str(file), "exec")
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    known = dir(importlib.import_module(f"llava_jax.{module}")) + dir(builtins)
    assert loaded_globals(code) <= set(known)


def test_only_the_public_model_needs_jax_and_no_import_runs_it():
    programs = (
        "import sys, llava_jax, llava_jax.config; assert 'jax' not in sys.modules",
        "import sys, llava_jax.training.run, jax\n"
        "assert not jax._src.xla_bridge.backends_are_initialized()\n"
        "assert 'torch' not in sys.modules",
    )
    for program in programs:
        subprocess.run([sys.executable, "-c", program], check=True)
