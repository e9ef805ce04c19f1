"""`llava-jax convert`: reads a LLaVA checkpoint in any form and writes it in another."""

import argparse
import sys
from pathlib import Path

from llava_jax.cli.model_options import source
from llava_jax.data.templates import TEMPLATES
from llava_jax.distributed.environment import print_any_text
from llava_jax.errors import CheckpointError, ConfigError


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 for a user's mistake or a bad checkpoint."""
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
    """Parses the arguments."""
    parser = argparse.ArgumentParser(
        prog="llava-jax convert",
        description="Converts between the checkpoints of Hugging Face, PEFT, LLaVA and XTuner. The "
        "form of the source is recognised by its contents, not by its name. Pickles (.bin, .pth) "
        "are read, but nothing in them is executed.",
    )
    parts = "llm=DIR,vision=DIR[,projector=FILE]"
    sources = f"a directory, also that of a run, a file, a hub id, or {parts}"
    parser.add_argument("source", type=source, help=sources)
    parser.add_argument(
        "destination", type=Path, help="the directory to write; it must not exist yet"
    )
    forms = {
        "hf": "a LLaVA for transformers with the tensor names of 4.36 to 4.51, which all versions "
        "read; if the source is a decoder or a vision tower alone, a directory of the same kind",
        "hf5": "a LLaVA with the tensor names of transformers 5",
        "peft": "a PEFT adapter",
        "llava": "a directory for LLaVA's own code",
    }
    help_to = "; ".join(f"{name}: {what}" for name, what in forms.items())
    parser.add_argument("--to", required=True, choices=forms, help=help_to)
    parser.add_argument(
        "--base", type=source, help="the model that the source was trained on, in any form"
    )
    merge = "merge the adapters into their base, and compare the logits before and after"
    parser.add_argument("--merge", action="store_true", help=merge)
    era = "tensor names of a PEFT adapter: 5 for transformers 4.52 and later, 4 for up to 4.51"
    parser.add_argument("--era", type=int, choices=(4, 5), default=5, help=f"{era} (default: 5)")
    alpha = "alpha of the decoder's LoRA, needed for a .pth file, which does not contain it"
    parser.add_argument("--alpha", type=float, help=alpha)
    parser.add_argument("--vision-alpha", type=float, help="the same for the vision tower")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the weights (default: as in the source)",
    )
    template = "chat template (default: the source's own, or the one that fits the decoder)"
    parser.add_argument("--template", choices=TEMPLATES, help=template)
    aspect = "what is done with images that are not square (default: as the source says)"
    parser.add_argument("--image-aspect", choices=("pad", "crop", "squash"), help=aspect)
    return parser.parse_args(argv)


def convert_given(given: argparse.Namespace) -> None:
    """Converts what the arguments name.

    Raises:
        ConfigError, CheckpointError, OSError: The source cannot be converted.
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
            raise ConfigError(f"{part.path} is a part alone, no LLaVA: take --to hf{without}")
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
