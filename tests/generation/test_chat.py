"""The commands of the terminal chat."""

import pytest

from llava_jax.generation.chat import Chat


def converse(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(given))
    Chat.__new__(Chat).converse()  # these commands need no model


@pytest.mark.parametrize("line", ["/help", " /help ", "/image"])
def test_help_lists_the_commands(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    converse([line, "/exit"], monkeypatch)
    said = capsys.readouterr().out
    assert said.startswith("  /image FILE   add an image")
    assert "/exit" in said
