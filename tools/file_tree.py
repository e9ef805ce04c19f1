"""Prints the file tree of the package, with the first line of each module's docstring.

docs/architecture.md contains this tree; a test checks that both are equal.
"""

import argparse
import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "llava_jax"
WIDTH = 24


def main() -> int:
    """Runs the command; returns 0."""
    argparse.ArgumentParser(prog="python tools/file_tree.py", description=__doc__).parse_args()
    print("\n".join(file_tree()))
    return 0


def file_tree(folder: Path = PACKAGE, indent: str = "") -> list[str]:
    """Returns the tree as lines of text. A folder is shown with the docstring of `__init__.py`."""
    lines = [_line(indent, f"{folder.name}/", folder / "__init__.py")]
    indent += "  "
    # Folders that are symbolic links (presets and assets) contain no modules of the package.
    entries = sorted(folder.iterdir(), key=lambda entry: (entry.is_dir(), entry.name))
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink() and (entry / "__init__.py").exists():
            lines += file_tree(entry, indent)
        elif entry.suffix == ".py" and entry.name != "__init__.py":
            lines.append(_line(indent, entry.name, entry))
    return lines


def _line(indent: str, name: str, file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return f"{indent + name:<{WIDTH}} {docstring.splitlines()[0].removesuffix('.')}"


if __name__ == "__main__":
    sys.exit(main())
