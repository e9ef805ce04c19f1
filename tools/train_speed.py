"""Compares the speed of `llava_jax.train` with a training loop in transformers and PEFT.

The model has random weights, and the data has random conversations about random photographs. Both
programs read the same JSON file and the same JPEGs, train LoRA adapters on the same records in the
same order, and run in turn, each time in a new process. `llava_jax.train` gets a config with data,
init_from, the batch size and the number of steps; everything else has its default value. The loop
in transformers and PEFT reads data in as many worker processes, and pads each batch to its longest
sample. Further arguments are passed to `llava_jax.train`, for example --memory.remat none.

The speed is the median over all steps, except the first ones, of the tokens of a step, without
padding, divided by its seconds, which include the time spent waiting for data. The exit status is 1
if a ratio of the speeds is below its goal.
"""

import argparse
import sys

from llava_jax.speed.case import SHAPES

GOALS = {"25m": 1.3, "150m": 1.15}
WORDS = {"short": (20, 60), "long": (200, 600)}
"""Smallest and largest number of words in a conversation; each word is one token."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0 if all goals are reached, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python tools/train_speed.py", description=__doc__)
    add = parser.add_argument
    shown = "(default: %(default)s)"
    shapes = f"numbers of parameters of the models {shown}"
    add("--shapes", nargs="+", choices=SHAPES, default=[*GOALS], help=shapes)
    samples = f"lengths of the conversations {shown}"
    add("--samples", nargs="+", choices=WORDS, default=[*WORDS], help=samples)
    add("--batch", type=int, default=4, help=f"number of samples in a train step {shown}")
    add("--rounds", type=int, default=3, help=f"number of runs of each program {shown}")
    add("--steps", type=int, default=12, help=f"number of measured train steps in a run {shown}")
    dtypes = ("float32", "bfloat16")
    dtype = (
        "dtype of transformers and PEFT. On a CPU without bfloat16 units, bfloat16 is many times "
    )
    add("--peer-dtype", choices=dtypes, default="float32", help=f"{dtype}slower for them {shown}")
    warmup = f"number of train steps in a run before the first measured step {shown}"
    add("--warmup", type=int, default=4, help=warmup)
    given, rest = parser.parse_known_args(argv)

    # This import is slow, and --help must be quick.
    from speed.train import compare

    print("| model | samples | ours, tokens/s | theirs, tokens/s | ratio | goal | buckets |")
    print("|---|---|---|---|---|---|---|", flush=True)
    reached = True
    for shape in given.shapes:
        for samples in given.samples:
            found = compare(SHAPES[shape], WORDS[samples], given, rest)
            goal = GOALS.get(shape, 0)
            reached &= found.ratio >= goal
            speeds = f"{found.ours:,.0f} | {found.theirs:,.0f} | {found.ratio:.2f}"
            print(f"| {shape} | {samples} | {speeds} | {goal} | {found.buckets} |", flush=True)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
