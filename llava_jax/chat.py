"""A conversation in a terminal."""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_jax.assistant import Assistant
from llava_jax.data.conversation import IMAGE_PLACEHOLDER, SampleError, Turn
from llava_jax.data.images import open_image
from llava_jax.prompts import Prompt
from llava_jax.sampling import Sampling

COMMANDS = """\
  /image FILE   show it a picture, with your next message; again for several
  /reset        begin a new conversation
  /save FILE    write the conversation, as LLaVA's training data has it
  /exit         end (or Ctrl-D); Ctrl-C ends an answer"""


class Chat:
    """What was said and shown so far.

    Args:
        assistant: With a free slot.
        sampling: How tokens are chosen.
        max_new_tokens: Most tokens of an answer.
        stop: Texts that end one.
        system: What the system says; None is the template's own.
    """

    def __init__(
        self,
        assistant: Assistant,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        system: str | None = None,
    ):
        self._assistant, self._sampling = assistant, sampling
        self._max_new_tokens, self._stop, self._system = max_new_tokens, stop, system
        self.reset()

    def reset(self) -> None:
        """Forgets all that was said and shown."""
        self._turns = [Turn("system", self._system)] if self._system else []
        self._images: list[str] = []
        self._new_images: list[str] = []

    def show(self, file: str) -> None:
        """Takes a picture for the next message.

        Raises:
            SampleError: It cannot be read.
        """
        open_image(file)
        self._new_images.append(file)

    def say(self, text: str) -> None:
        """Asks, and prints the answer as it comes; what fails leaves all as it was.

        Raises:
            SampleError: The conversation cannot be used, as when it has become too long.
        """
        text = text.replace(IMAGE_PLACEHOLDER, "")
        asked = Turn("human", f"{IMAGE_PLACEHOLDER}\n" * len(self._new_images) + text)
        prompt = Prompt((*self._turns, asked), (*self._images, *self._new_images))
        pieces = self._assistant.stream(
            prompt,
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
            stop=self._stop,
        )
        answer = ""
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(pieces):
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        print()
        self._turns += [asked, Turn("gpt", answer.strip())]
        self._images, self._new_images = [*self._images, *self._new_images], []

    def save(self, file: str) -> None:
        """Writes the conversation as LLaVA's data has it: a list of one record.

        Raises:
            OSError: The file cannot be written.
        """
        record = {
            "id": Path(file).stem,
            "image": [str(Path(image).absolute()) for image in self._images],
            "conversations": [{"from": turn.role, "value": turn.text} for turn in self._turns],
        }
        Path(file).write_text(json.dumps([record], indent=2, ensure_ascii=False) + "\n")

    def converse(self) -> None:
        """Reads messages and commands until the end."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - its import lets input() edit lines and remember them
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line == "/exit":
                return
            try:
                self._take(line)
            except (SampleError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)

    def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        actions = {"/image": self.show, "/save": self.save}
        if word == "/reset":
            self.reset()
        elif word in actions and rest.strip():
            actions[word](rest.strip())
        elif line.startswith("/"):
            print(COMMANDS)
        elif line:
            self.say(line)
