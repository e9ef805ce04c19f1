"""Runs a conversation with a model in a terminal."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_jax.data.conversation import IMAGE_PLACEHOLDER, Turn
from llava_jax.data.images import open_image
from llava_jax.errors import ConfigError, SampleError
from llava_jax.generation.assistant import Assistant
from llava_jax.generation.prompts import Prompt
from llava_jax.generation.sampling import Sampling

COMMANDS = """\
  /image FILE   add an image to your next message; repeat the command to add several images
  /reset        begin a new conversation
  /save FILE    write the conversation to a JSON file in the format of LLaVA's training data
  /help         show these commands
  /exit         end the chat; Ctrl-D does the same; Ctrl-C stops an answer or clears the line"""


class Chat:
    """A conversation with a model, and its images.

    Args:
        assistant: Assistant with a free slot.
        sampling: Settings by which tokens are chosen.
        max_new_tokens: Largest number of tokens of an answer.
        stop: Texts that end an answer.
        system: System prompt; None takes the system prompt of the chat template.
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
        """Begins a new conversation: removes all images, and all turns except the system prompt."""
        self._turns = [Turn("system", self._system)] if self._system else []
        self._images: list[str] = []
        self._new_images: list[str] = []

    def show(self, file: str) -> None:
        """Adds an image to the next message.

        Args:
            file: Path of an image file.

        Raises:
            SampleError: The image cannot be read.
        """
        open_image(file)
        self._new_images.append(file)

    def say(self, text: str) -> None:
        """Sends a message, and prints the answer as it is generated.

        Ctrl-C stops the answer; the part that was printed stays in the conversation. An error, or
        an answer without text, leaves the conversation unchanged.

        Raises:
            SampleError: The conversation cannot be used, for example because it is too long.
        """
        text = text.replace(IMAGE_PLACEHOLDER, "")
        question = Turn("human", f"{IMAGE_PLACEHOLDER}\n" * len(self._new_images) + text)
        prompt = Prompt((*self._turns, question), (*self._images, *self._new_images))
        pieces = self._assistant.stream(
            prompt,
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
            stop=self._stop,
        )
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            self._assistant.reset()  # an interrupted step has lost its caches
        print()
        if not answer.strip():  # a turn without text would be refused as training data
            return
        self._turns += [question, Turn("gpt", answer.strip())]
        self._images, self._new_images = [*self._images, *self._new_images], []

    def save(self, file: str) -> None:
        """Writes the conversation in the format of LLaVA's training data, as one record.

        Args:
            file: Path of the JSON file to write.

        Raises:
            ConfigError: There is no answer yet.
            OSError: The file cannot be written.
        """
        if not any(turn.role == "gpt" for turn in self._turns):
            raise ConfigError("there is no answer yet, so there is nothing to save")
        images = [str(Path(image).absolute()) for image in self._images]
        turns = [{"from": turn.role, "value": turn.text} for turn in self._turns]
        record = {"id": Path(file).stem, **({"image": images} if images else {})}
        text = json.dumps([record | {"conversations": turns}], indent=2, ensure_ascii=False)
        Path(file).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")

    def converse(self) -> None:
        """Reads messages and commands from the terminal until the user ends the conversation."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and a history
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                continue
            if line in ("/exit", "/quit"):
                return
            try:
                self._take(line)
            except SampleError as error:
                again = "; /reset begins a new conversation" if error.kind == "length" else ""
                print(f"error: {error}{again}", file=sys.stderr)
            except (ConfigError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)

    def _take(self, line: str) -> None:
        """Sends a message, or runs a command."""
        word, _, rest = line.partition(" ")
        file = os.path.expanduser(rest.strip().strip("'\""))
        if not line.startswith("/"):
            if line:
                self.say(line)
        elif word == "/reset":
            self.reset()
            print("began a new conversation")
        elif word == "/image" and file:
            self.show(file)
            print("the image will be sent with your next message")
        elif word == "/save" and file:
            self.save(file)
            print(f"wrote {file}")
        else:
            unknown = f"there is no command {word}; the commands are:\n"
            print((unknown if word not in COMMANDS.split() else "") + COMMANDS)
