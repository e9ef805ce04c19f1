"""Defines the config of a run's data: where the data is, and how samples are made from it."""

import dataclasses
from typing import Annotated, Literal

import tyro

from llava_jax.config.fields import (
    IGNORED_BY_PLAN,
    LOCATION,
    MACHINE,
    NOT_EMPTY,
    OBSERVED,
    PLAN,
    Bound,
    above,
    at_least,
    at_most,
    check_fields,
    fraction,
    within,
)

Aspect = Literal["pad", "crop", "squash"]
Decode = Literal["exact", "draft"]
TrainOn = Literal["answers", "last_answer"]

DEMO_DATA = "easy_vqa:"
"""Beginning of the paths that select the data set of the demo, easy-VQA."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One of several data sets that are mixed for training.

    Attributes:
        path: Data of this data set, in any form that `DataConfig.path` accepts.
        image_root: Directory or fsspec URL to which image paths in the records are relative.
        weight: Number of times that an epoch contains each record. With 0.5, an epoch contains half
            of the records, and the next epoch the other half.
    """

    path: str
    image_root: str = ""
    weight: Annotated[
        float,
        above(0, "to skip this data set, remove it"),
        at_most(1e4, "an epoch contains each record this number of times"),
    ] = 1.0

    def __post_init__(self):
        check_fields(self, "data.mixture: ")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and the evaluation data.

    Attributes:
        path: Data file, directory of data files, or glob pattern such as "data/train-*.parquet".
            Files contain a JSON list, JSON lines or Parquet; docs/data.md lists the forms of the
            records. fsspec URLs (gs://, s3://) also work. "hf:USER/NAME[:SPLIT]" is a data set of
            the Hugging Face hub, or of a directory that Hugging Face's `datasets` can read. The
            value "easy_vqa:train[:FORM...]" selects the data set easy-VQA from its PyPI package.
        image_root: Directory or fsspec URL to which image paths in the records are relative.
        mixture: Data sets to mix for training, instead of `path` and `image_root`.
        follow_links: Allow symbolic links in data.image_root to images outside of that directory.
        train_on: Answers that are learned. "answers" learns all answers of a conversation, and
            "last_answer" only the last one. An answer that its record excludes, for example with
            "loss": false, is never learned.
        template: Name of the chat template, as defined in llava_jax/data/templates.py.
        image_aspect: How an image is made square: "pad" adds borders of the mean color, "crop"
            keeps the center, and "squash" scales width and height separately, as SigLIP does.
        image_decode: Size at which training images are decoded. "exact" uses the full size. "draft"
            decodes JPEGs that are much larger than needed at 1/2, 1/4 or 1/8 of their size, which
            is twice as fast and changes pixels by 0.5 to 2.5 of 255 levels on average.
        exif_orientation: Turn images upright as their Exif orientation says, like image viewers do;
            the exported model does the same. False uses the pixels as they are stored.
        max_length: Maximum number of tokens in a sequence, including the tokens of its images;
            longer sequences are truncated.
        max_text_length: Maximum number of tokens in a sequence if each image counts as one token,
            as in XTuner; longer sequences are truncated. None sets no such limit.
        buckets: Row lengths that a batch may have, besides data.max_length. Each batch has the
            shortest length that fits its samples. "auto" chooses the lengths for the data when a
            run begins. Without a value, all batches have rows of data.max_length tokens.
        image_buckets: Numbers of image slots that the rows of a batch may have, besides the largest
            number of images in a row. Each batch has the smallest number that fits its samples.
            "auto" chooses the numbers for the data when a run begins. Without a value, all batches
            have the largest number.
        packing: Put as many samples of a step as fit into each row. This needs less padding and
            does not change results. Each batch has the row length, of those in data.buckets and
            data.max_length, that needs the fewest tokens.
        max_images: Maximum number of images in a sample; None takes the maximum in the data.
        max_frames: Maximum number of frames of a video that the model sees. A longer video is
            shown by frames that are evenly spread over it, and a shorter one by one frame per
            second.
        shuffle: Read the records in a new random order in each epoch.
        group_by_modality_length: Put samples with and without images into separate batches, like
            LLaVA's option of the same name.
        max_skipped: Maximum fraction of the samples that may be skipped because they cannot be
            used. The run stops if more samples are skipped.
        workers: Number of processes that decode images; 0 uses the main process.
        eval_path: Evaluation data, in any form that data.path accepts. None turns evaluation off,
            unless data.eval_fraction is set.
        eval_image_root: Directory or fsspec URL to which image paths in the evaluation data are
            relative; None takes data.image_root.
        eval_fraction: Fraction of the training records to hold out as evaluation data, instead of
            data.eval_path. These records are not learned. Records that share an image are kept
            together. The choice depends only on the records and on the seed.
        eval_samples: Number of samples to evaluate, starting with the first; None evaluates all.
    """

    path: Annotated[str, LOCATION] = ""
    image_root: Annotated[str, LOCATION] = ""
    mixture: Annotated[tyro.conf.Suppress[tuple[DataSet, ...]], LOCATION] = ()
    follow_links: bool = False
    train_on: TrainOn = "answers"
    template: str = "vicuna_v1"
    image_aspect: Aspect = "pad"
    image_decode: Decode = "exact"
    exif_orientation: bool = True
    max_length: Annotated[int, at_least(1, "it is a number of tokens")] = 2048
    max_text_length: Annotated[int | None, at_least(1, "it is a number of tokens")] = None
    buckets: Annotated[
        tuple[int, ...] | Literal["auto"],
        PLAN,
        IGNORED_BY_PLAN,  # a plan is measured with rows of max_length tokens
        Bound(
            lambda lengths: lengths == "auto" or min(lengths, default=1) >= 1,
            "positive",
            "they are lengths",
        ),
    ] = "auto"
    image_buckets: Annotated[
        tuple[int, ...] | Literal["auto"],
        PLAN,
        IGNORED_BY_PLAN,  # a plan is measured with the largest number of images
        Bound(
            lambda slots: slots == "auto" or min(slots, default=0) >= 0,
            "not negative",
            "they are numbers of images",
        ),
    ] = "auto"
    packing: Annotated[bool, PLAN] = False
    max_images: Annotated[int | None, at_least(0, "it is a number of images")] = None
    max_frames: Annotated[int, at_least(1, "it is a number of frames")] = 32
    shuffle: bool = True
    group_by_modality_length: bool = False
    max_skipped: Annotated[float, OBSERVED, within(0, 1, "it is a fraction of the samples")] = 0.01
    workers: Annotated[
        int, MACHINE, at_least(0, "0 uses the main process"), at_most(1024, "each is a process")
    ] = 4
    eval_path: Annotated[str | None, LOCATION, NOT_EMPTY] = None
    eval_image_root: Annotated[str | None, LOCATION] = None
    eval_fraction: Annotated[
        float, IGNORED_BY_PLAN, fraction("the other records are learned; 0 holds out nothing")
    ] = 0.0
    eval_samples: Annotated[
        int | None, OBSERVED, at_least(1, "to turn evaluation off, set data.eval_path to None")
    ] = None

    @property
    def has_eval(self) -> bool:
        """Whether there is evaluation data."""
        return self.eval_path is not None or self.eval_fraction > 0

    @property
    def uses_image_root_for_eval(self) -> bool:
        """Whether image_root is the directory of the images of eval_path."""
        return self.eval_path is not None and self.eval_image_root is None
