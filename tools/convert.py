"""Reads any LLaVA checkpoint, writes another form: `python tools/convert.py --help`."""

import argparse
import sys
from pathlib import Path

from llava_jax.config import parse_source
from llava_jax.data.templates import TEMPLATES
from llava_jax.distributed.environment import print_any_text
from llava_jax.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 for a mistake or a checkpoint that is amiss."""
    given = parse(argv)
    print_any_text()

    from llava_jax.errors import CheckpointError  # slow, and not for --help

    try:
        convert_given(given)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {given.destination}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/convert.py",
        description="Converts between Hugging Face's, PEFT's, LLaVA's and XTuner's checkpoints. "
        "A source is known by what it holds, not by its name. Pickles (.bin, .pth) are read "
        "without being run.",
    )
    parts = "llm=DIR,vision=DIR[,projector=FILE]"
    source = f"a directory, a file, a run's directory, a hub id, or {parts}"
    parser.add_argument("source", help=source)
    parser.add_argument("destination", type=Path, help="a directory that does not exist")
    forms = {
        "hf": "transformers' LLaVA (names of 4.36 to 4.51, which all versions read), or for a "
        "decoder or a vision tower alone that part's own directory",
        "hf5": "LLaVA with the names of transformers 5",
        "peft": "a PEFT adapter",
        "llava": "what LLaVA's own code reads",
    }
    help_to = "; ".join(f"{name}: {what}" for name, what in forms.items())
    parser.add_argument("--to", required=True, choices=forms, help=help_to)
    parser.add_argument("--base", help="what the source was trained on, in any form of a source")
    merge = "fold adapters into their base, and compare logits before and after"
    parser.add_argument("--merge", action="store_true", help=merge)
    era = "names in a PEFT adapter: of transformers 5 (and 4.52 to 4.57), or 4 (up to 4.51)"
    parser.add_argument("--era", type=int, choices=(4, 5), default=5, help=f"{era}; default 5")
    alpha = "LoRA's alpha of the decoder, for a .pth file, which does not say it"
    parser.add_argument("--alpha", type=float, help=alpha)
    parser.add_argument("--vision-alpha", type=float, help="likewise of the vision tower")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights"
    )
    template = (
        "conversations, for apply_chat_template (default: the source's own, or what fits the "
        "decoder)"
    )
    parser.add_argument("--template", choices=TEMPLATES, help=template)
    aspect = "images that are not square (default: as the source says)"
    parser.add_argument("--image-aspect", choices=("pad", "crop", "squash"), help=aspect)
    return parser.parse_args(argv)


def convert_given(given: argparse.Namespace) -> None:
    """Converts what the command line names.

    Raises:
        ConfigError, CheckpointError, OSError: It cannot be.
    """
    from llava_jax.conversion.convert import check_free, convert, open_source
    from llava_jax.conversion.single_part import convert_part, open_part
    from llava_jax.conversion.verify_merge import check_merged
    from llava_jax.models.paths import LLM, VISION

    check_free(given.destination)
    source = parse_source(given.source) or given.source
    if given.base is None and (part := open_part(source)) is not None:
        of_llava = ("merge", "alpha", "vision_alpha", "template", "image_aspect")
        odd = [f"--{name.replace('_', '-')}" for name in of_llava if getattr(given, name)]
        if given.to != "hf" or odd:
            without = f" without {', '.join(odd)}" if odd else ""
            raise ConfigError(f"{part.path} is a part alone, no LLaVA: take --to hf{without}")
        convert_part(part, given.destination, given.dtype)
        return
    alphas = {LLM: given.alpha, VISION: given.vision_alpha}
    opened = open_source(
        source,
        parse_source(given.base) if given.base else None,
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
