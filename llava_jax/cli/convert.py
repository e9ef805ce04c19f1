"""Implements `llava-jax convert`, which converts a LLaVA checkpoint to another format."""

import argparse
import sys
from pathlib import Path

from llava_jax.cli.arguments import Parser, positive, report_errors
from llava_jax.cli.model_options import source
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, or 1 if the source cannot be converted."""
    given = parse(argv)
    return report_errors(lambda: convert_given(given))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = Parser(
        prog="llava-jax convert",
        description="Converts checkpoints between the formats of Hugging Face, PEFT and LLaVA. "
        "Checkpoints in XTuner's format can be converted to these formats. The format of the "
        "source is detected from the contents of its files, not from their names. Pickle files "
        "(.bin, .pth) are read without executing any code in them.",
    )
    parts = "llm=DIR,vision=DIR[,projector=FILE]"
    sources = "checkpoint to convert: the directory of a checkpoint or of a run, a file, an id on "
    sources += f"the Hugging Face Hub, or {parts} for separate parts"
    parser.add_argument("source", type=source, help=sources)
    parser.add_argument(
        "destination", type=Path, help="directory to write to; it must not exist, or must be empty"
    )
    forms = {
        "hf": "a LLaVA model for transformers, with the tensor names of versions 4.36 to 4.51, "
        "which newer versions can also read (if the source contains only a decoder or only a "
        "vision tower, this part is written in the format of transformers)",
        "hf5": "a LLaVA model with the tensor names of transformers 5",
        "peft": "a PEFT adapter",
        "llava": "a checkpoint for LLaVA's own code",
    }
    help_to = "format to write. " + "; ".join(f"{name}: {what}" for name, what in forms.items())
    parser.add_argument("--to", required=True, choices=forms, help=help_to)
    parser.add_argument(
        "--base",
        type=source,
        help="base model with which the adapter or projector in the source was trained, in any "
        "format (default: the base model given in the files of the source)",
    )
    merge = "merge the adapters into the base model, and check the merged weights and logits"
    parser.add_argument("--merge", action="store_true", help=merge)
    era = "tensor names in a PEFT adapter: 5 for transformers 4.52 and later, 4 for older versions"
    parser.add_argument("--era", type=int, choices=(4, 5), default=5, help=f"{era} (default: 5)")
    alpha = "alpha of the {}'s LoRA adapters (default: the alpha in the source; required for .pth "
    alpha += "files, which do not contain the alpha)"
    parser.add_argument("--alpha", type=positive, help=alpha.format("decoder"))
    parser.add_argument("--vision-alpha", type=positive, help=alpha.format("vision tower"))
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the written weights (default: the dtype in the source)",
    )
    template = "chat template to write (default: the chat template of the source; if the source "
    template += "has none, a chat template that fits the decoder)"
    parser.add_argument("--template", choices=TEMPLATES, help=template)
    aspect = "how images become square: pad adds borders, crop cuts off the ends of the longer "
    aspect += "side, squash changes the aspect ratio (default: as in the source)"
    parser.add_argument("--image-aspect", choices=("pad", "crop", "squash"), help=aspect)
    return parser.parse_args(argv)


def convert_given(given: argparse.Namespace) -> int:
    """Converts the checkpoint that the arguments name, and returns the exit status 0.

    Args:
        given: Arguments of the command.

    Raises:
        ConfigError: The arguments are not allowed for this source, or the destination is not empty.
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
                f"{part.path} contains only a decoder or only a vision tower, not a complete LLaVA "
                f"model; use --to hf{without}"
            )
        convert_part(part, given.destination, given.dtype)
        print(f"wrote {given.destination}")
        return 0
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
    print(f"wrote {given.destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
