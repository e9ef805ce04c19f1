"""Every command that README and the pages print exists, with the options that they give it."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
OURS = re.compile(r"(?:^|\s)(llava-jax [a-z].*|python -m llava_jax.*|python tools/.*)")


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command of ours in the bash blocks of a page."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\bdo\b|;", line):
                if match := OURS.search(part):
                    text = match[1]
                    if text.count('"') % 2:  # the end of --command="... && llava-jax ..."
                        text = text.rstrip('"')
                    words = shlex.split(text, comments=True)
                    found.append([word for word in words if word != "..."])
    return found


def in_tests(words: list[str]) -> list[str]:
    """The command as this interpreter runs it, without an installed script."""
    if words[0] == "llava-jax":
        return [sys.executable, "-m", "llava_jax", *words[1:]]
    return [sys.executable, *words[1:]]


@functools.cache
def help_of(command: tuple[str, ...]) -> str:
    done = subprocess.run(
        [*command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    assert done.returncode == 0, f"{' '.join(command)} --help: {done.stderr or done.stdout}"
    return done.stdout


COMMANDS = {" ".join(words): words for page in PAGES for words in commands_of(page)}


def test_readme_shows_commands():
    assert len(commands_of(ROOT / "README.md")) >= 5
    assert len(COMMANDS) >= 30


@pytest.mark.parametrize("text", COMMANDS)
def test_command_exists(text):
    """A config adds its fields to the options, which training lists."""
    words = in_tests(COMMANDS[text])
    start = 2 if words[1] != "-m" else 4 if words[2] == "llava_jax" else 3
    shown = help_of(tuple(words[:start]))
    if "--config" in words:
        config = words[words.index("--config") + 1]
        config = "7b_lora" if config == "my_config.py" else config
        shown += help_of((sys.executable, "-m", "llava_jax", "train", "--config", config))
    options = {word.partition("=")[0] for word in words[start:] if word.startswith("--")}
    missing = [o for o in options if not re.search(rf"{re.escape(o)}(?![\w-])", shown)]
    assert missing == []


def test_presets_of_the_docs_exist():
    """Each preset has a row in the guide."""
    names = {file.stem for file in (ROOT / "configs").glob("*.py")}
    shown = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "fine_tune.md").read_text()))
    assert names - shown == set()
