"""Implements `llava-jax convert`, which converts a LLaVA checkpoint to another format."""

import argparse
import sys
from pathlib import Path

from llava_jax.cli.model_options import source
from llava_jax.data.templates import TEMPLATES
from llava_jax.distributed.environment import print_any_text
from llava_jax.errors import CheckpointError, ConfigError


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, or 1 if the source cannot be converted."""
    given = parse(argv)
    print_any_text()
    try:
        convert_given(given)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {given.destination}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="llava-jax convert",
        description="Converts checkpoints between the formats of Hugging Face, PEFT and LLaVA, and "
        "from the format of XTuner. The format of the source is detected from its contents, not "
        "from its name. Pickle files (.bin, .pth) are read, but nothing in them is executed.",
    )
    parts = "llm=DIR,vision=DIR[,projector=FILE]"
    sources = f"checkpoint to convert: a directory, a run's directory, a file, a hub id, or {parts}"
    parser.add_argument("source", type=source, help=sources)
    parser.add_argument(
        "destination", type=Path, help="directory to write to; it must be new or empty"
    )
    forms = {
        "hf": "a LLaVA model for transformers, with the tensor names of versions 4.36 to 4.51, "
        "which newer versions read too (a source that is only a decoder or only a vision tower "
        "becomes a directory of the same kind)",
        "hf5": "a LLaVA model with the tensor names of transformers 5",
        "peft": "a PEFT adapter",
        "llava": "a directory that LLaVA's own code reads",
    }
    help_to = "; ".join(f"{name}: {what}" for name, what in forms.items())
    parser.add_argument("--to", required=True, choices=forms, help=help_to)
    parser.add_argument(
        "--base",
        type=source,
        help="model that the adapter or projector in the source was trained on, in any format",
    )
    merge = "merge the adapters into the base model, and check the merged weights and logits"
    parser.add_argument("--merge", action="store_true", help=merge)
    era = "tensor names of a PEFT adapter: 5 for transformers 4.52 and later, 4 for older versions"
    parser.add_argument("--era", type=int, choices=(4, 5), default=5, help=f"{era} (default: 5)")
    alpha = (
        "alpha of the decoder's LoRA adapters; needed for a .pth file, which does not contain it"
    )
    parser.add_argument("--alpha", type=float, help=alpha)
    parser.add_argument(
        "--vision-alpha",
        type=float,
        help="alpha of the vision tower's LoRA adapters; needed for a .pth file",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the written weights (default: the dtype in the source)",
    )
    template = "chat template (default: from the source, or one that fits the decoder)"
    parser.add_argument("--template", choices=TEMPLATES, help=template)
    aspect = (
        "how images become square: with borders, cropped or squashed (default: as in the source)"
    )
    parser.add_argument("--image-aspect", choices=("pad", "crop", "squash"), help=aspect)
    return parser.parse_args(argv)


def convert_given(given: argparse.Namespace) -> None:
    """Converts the checkpoint that the arguments name.

    Args:
        given: Arguments of the command.

    Raises:
        ConfigError: The arguments do not fit the source, or the destination exists already.
        CheckpointError: The source is damaged or cannot be written in this format.
        OSError: A file cannot be read or written.
    """
    from llava_jax.conversion.convert import check_free, convert, open_source
    from llava_jax.conversion.single_part import convert_part, open_part
    from llava_jax.conversion.verify_merge import check_merged
    from llava_jax.models.paths import LLM, VISION

    check_free(given.destination)
    if given.base is None and (part := open_part(given.source)) is not None:
        of_llava = ("merge", "alpha", "vision_alpha", "template", "image_aspect")
        odd = [f"--{name.replace('_', '-')}" for name in of_llava if getattr(given, name)]
        if given.to != "hf" or odd:
            without = f" without {', '.join(odd)}" if odd else ""
            raise ConfigError(
                f"{part.path} is only a decoder or a vision tower, not a LLaVA model; take --to hf"
                f"{without}"
            )
        convert_part(part, given.destination, given.dtype)
        return
    alphas = {LLM: given.alpha, VISION: given.vision_alpha}
    opened = open_source(
        given.source,
        given.base,
        alphas={stack: alpha for stack, alpha in alphas.items() if alpha is not None},
    )
    convert(
        opened,
        given.destination,
        given.to,
        merge=given.merge,
        era=given.era,
        dtype=given.dtype,
        template=TEMPLATES[given.template] if given.template else None,
        aspect=given.image_aspect,
        prove=check_merged if given.merge and opened.adapters else None,
    )


if __name__ == "__main__":
    sys.exit(main())
