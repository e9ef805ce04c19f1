"""A wheel works without a clone, and a clone in the working directory does not hide the package."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from live_server import RED_TRIANGLE

ROOT = Path(__file__).parents[2]
BUILT = ("llava_jax", "configs", "assets", "pyproject.toml", "README.md", "LICENSE")
WHERE = "import llava_jax; llava_jax.__all__; print(llava_jax.__file__)"
PUBLIC = f"from llava_jax import LlavaModel, generate; {WHERE}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clone that is called llava_jax, as git calls it."""
    folder = tmp_path_factory.mktemp("work")
    for name in BUILT:
        source, copy = ROOT / name, folder / "llava_jax" / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy, symlinks=True, ignore=ignored)
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    return folder


def build(clone: Path, kind: str) -> Path:
    """Builds a wheel as pip does: "wheel", or "editable"."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}('../{kind}')"
    (clone.parent / kind).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=clone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (clone.parent / kind).iterdir()
    return wheel


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    return build(folder / "llava_jax", "wheel")


@pytest.fixture(scope="module")
def editable(folder: Path) -> Path:
    return build(folder / "llava_jax", "editable")


def test_the_wheel_has_all_that_the_clone_has(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "llava_jax"
    files = {f"llava_jax/{file.relative_to(package)}" for file in package.rglob("*.py")}
    files |= {f"llava_jax/presets/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    tiny = (ROOT / "assets").glob("*/*")
    files |= {f"llava_jax/assets/{file.parent.name}/{file.name}" for file in tiny}
    templates = (package / "report" / "templates").iterdir()
    files |= {f"llava_jax/report/templates/{file.name}" for file in templates}
    assert {name for name in names if ".dist-info/" not in name} == files | {"llava_jax/py.typed"}
    text = zipfile.ZipFile(wheel).read("llava_jax-0.1.0.dist-info/entry_points.txt").decode()
    assert "llava-jax = llava_jax.cli.main:main" in text


def test_a_clone_in_the_working_directory_does_not_hide_the_package(
    folder: Path, wheel: Path, editable: Path
):
    """Neither the folder above the clone nor the one of a notebook beside it."""
    for kind, where in (("wheel", f"{folder}/wheel/site/"), ("editable", f"{folder}/llava_jax/")):
        site = folder / kind / "site"
        zipfile.ZipFile(wheel if kind == "wheel" else editable).extractall(site)
        # The working directory comes first, then the dependencies, then what was installed.
        # The tests may run in an environment that has this clone installed.
        program = f"import site, sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]; "
        program += f"site.addsitedir({str(site)!r}); {WHERE}"
        run = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == f"{where}llava_jax/__init__.py"


@pytest.fixture(scope="module")
def venv(folder: Path) -> Path:
    """A new environment that sees the packages of this one, but not its llava_jax."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True)
    (Path(site.stdout.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv" / "bin"


def run_in(venv: Path, cwd: Path, *command: object) -> str:
    """Runs a program of an environment; returns what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program, *arguments = map(str, command)
    run = subprocess.run(
        [venv / program, *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def install(venv: Path, *what: object) -> None:
    options = ("--no-deps", "--no-index", "--force-reinstall")
    run_in(venv, venv, "python", "-m", "pip", "install", *options, *what)


@pytest.mark.slow  # short: the two tests above
def test_an_installed_wheel_trains_and_chats(folder: Path, wheel: Path, venv: Path, tmp_path: Path):
    install(venv, wheel)
    where = run_in(venv, folder, "python", "-c", PUBLIC)
    assert where.startswith(str(folder / "venv"))
    for name in ("--help", "plan --help", "train --config 7b_lora --help"):
        assert run_in(venv, tmp_path, "llava-jax", *name.split()).startswith("usage: llava-jax")
    short = ["--steps", "60", "--data.eval-path", "None"]
    said = run_in(venv, tmp_path, "llava-jax", "train", "--config", "tiny_lora", *short)
    assert said.endswith("llava-jax chat runs/tiny_lora\n")
    asked = ["--prompt", "is there a red shape?", "--image", RED_TRIANGLE]
    for model in ("runs/tiny_lora", "tiny-llava"):
        assert run_in(venv, tmp_path, "llava-jax", "chat", model, *asked) in ("yes\n", "no\n")
    run_in(venv, tmp_path, "llava-jax", "report", "runs/tiny_lora")


@pytest.mark.slow
def test_an_editable_install_is_found_from_above_the_clone(
    folder: Path, editable: Path, venv: Path
):
    """As `pip install -e` makes it, which builds such a wheel and installs it."""
    install(venv, editable)
    where = run_in(venv, folder, "python", "-c", PUBLIC)
    assert where.strip() == str(folder / "llava_jax" / "llava_jax" / "__init__.py")
    assert run_in(venv, folder, "llava-jax", "--version") == "llava_jax 0.1.0\n"
    assert run_in(venv, folder, "python", "-m", "llava_jax", "--help").startswith("usage: llava-")
