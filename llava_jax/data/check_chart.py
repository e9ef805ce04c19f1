"""Draws the lengths of the samples of a data set, and the fraction of padding in its batches."""

from pathlib import Path

import numpy as np

from llava_jax.data.check_report import Report


def draw(path: Path, report: Report) -> None:
    """Draws four panels: lengths, numbers of images, fractions of learned tokens, and padding.

    Args:
        path: PNG file to write.
        report: Report on the data set, which must have at least one good sample.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (lengths, images), (shares, waste) = figure.subplots(2, 2)
    tokens, count = report.of_good("tokens"), report.of_good("images")
    kinds = {"with images": tokens[count > 0], "text only": tokens[count == 0]}
    lengths.hist(list(kinds.values()), bins=60, stacked=True, label=list(kinds))
    lengths.legend()
    lengths.set_xlabel("tokens per sample, including image tokens")
    numbers, samples = np.unique(count, return_counts=True)
    images.bar(numbers.astype(str), samples)
    images.set_xlabel("images per sample")
    shares.hist(100 * report.shares, bins=60)
    shares.set_xlabel("% of the tokens of a sample that are learned")
    for axes in (lengths, images, shares):
        axes.set_ylabel("samples")
    rows = report.padding_rows()
    labels = [f"{row['choice']}: {', '.join(map(str, row['lengths']))}" for row in rows]
    waste.barh(labels, [100 * row["waste"] for row in rows])
    waste.invert_yaxis()
    waste.set_xlabel("% of the tokens of an epoch that are padding")
    for axes in (lengths, images, shares, waste):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
