"""Trains with transformers and PEFT for `tools/train_speed.py`: `peer_loop.py DIRECTORY STEPS`.

Each sample is read, tokenized and preprocessed in a worker process of torch's DataLoader, and each
batch is padded to its longest sample. The token ids and the labels are those of `llava_jax.train`,
and so is the order of the records, so that both programs do the same work. The program prints one
line of JSON with the seconds, the tokens and the loss of each step.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor

from llava_jax.data.images import CLIP_MEAN
from llava_jax.speed.case import BASE, load_case
from llava_jax.speed.peer import Peer
from llava_jax.training.inputs import Inputs, find_model, open_inputs

Sample = dict[str, torch.Tensor]


class Samples(Dataset[Sample]):
    """The samples of a run, preprocessed with the image processor of transformers."""

    def __init__(self, inputs: Inputs, directory: Path, dtype: torch.dtype):
        self._inputs, self._dtype = inputs, dtype
        self._processor = AutoImageProcessor.from_pretrained(directory)

    def __getitem__(self, number: int) -> Sample:
        record = self._inputs.records[number]
        encoded = self._inputs.encoder.encode_text(record)
        ids = torch.from_numpy(encoded.input_ids).long()
        image = square(Image.open(record.images[0]).convert("RGB"))
        pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
        labels = ids.masked_fill(~torch.from_numpy(encoded.loss_mask), -100)
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels.to(self._dtype)}


def square(image: Image.Image) -> Image.Image:
    """Returns an image with borders of the mean color that make it square, as LLaVA does."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in CLIP_MEAN))
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


class Collate:
    """Callable that pads the samples of a batch to the longest one. Can be pickled."""

    def __init__(self, pad_token_id: int):
        self._pad = pad_token_id

    def __call__(self, samples: list[Sample]) -> Sample:
        column = lambda name: [sample[name] for sample in samples]
        pad = lambda name, value: pad_sequence(column(name), True, value)
        ones = [torch.ones_like(ids) for ids in column("input_ids")]
        return {
            "input_ids": pad("input_ids", self._pad),
            "attention_mask": pad_sequence(ones, True, 0),
            "labels": pad("labels", -100),
            "pixel_values": torch.stack(column("pixel_values")),
        }


def main() -> None:
    """Trains, and prints the measurements."""
    directory, steps = Path(sys.argv[1]), int(sys.argv[2])
    case = load_case(directory)
    inputs = open_inputs(case.config, *find_model(case.config, directory / BASE))
    peer = Peer(case, directory)
    loader = DataLoader(
        Samples(inputs, directory / BASE, peer.dtype),
        batch_sampler=[inputs.order.batch(step).tolist() for step in range(steps)],
        num_workers=case.config.data.workers,
        collate_fn=Collate(case.model.pad_token_id),
    )
    rows: list[dict[str, Any]] = []
    last = time.monotonic()
    for batch in loader:
        loss = peer.step(batch)()
        now = time.monotonic()
        tokens = int(batch["attention_mask"].sum())
        rows.append({"seconds": now - last, "tokens": tokens, "loss": loss})
        last = now
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
