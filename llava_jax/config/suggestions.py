"""Suggests the fields and options that a user probably meant by names that do not exist."""

import dataclasses
import difflib
import re

from llava_jax.config.data import DataSet
from llava_jax.config.fields import field_groups, read_fields
from llava_jax.config.source import Parts
from llava_jax.config.train import TrainConfig

_OTHER_NAMES = {
    **dict.fromkeys(("lr", "rate"), "optimizer.learning_rate"),
    **dict.fromkeys(("bs", "batch_size", "batch.size", "train_batch_size"), "batch.global_size"),
    "per_device_train_batch_size": "batch.micro_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "gradient_accumulation_steps": "batch.micro_size",
    **dict.fromkeys(("epoch", "num_epochs", "num_train_epochs"), "epochs"),
    **dict.fromkeys(("step", "max_steps", "num_steps"), "steps"),
    **dict.fromkeys(("model_name_or_path", "base_model", "base"), "init_from"),
    "mm_projector_lr": "optimizer.projector_learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    **dict.fromkeys(("max_grad_norm", "grad_clip"), "optimizer.clip_norm"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "lora.rank"),
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    **dict.fromkeys(("data", "data_path", "dataset", "train_file"), "data.path"),
    **dict.fromkeys(("eval_data_path", "validation_file"), "data.eval_path"),
    **dict.fromkeys(("image_folder", "image_dir", "images"), "data.image_root"),
    "image_aspect_ratio": "data.image_aspect",
    **dict.fromkeys(("model_max_length", "max_seq_length", "cutoff_len"), "data.max_length"),
    **dict.fromkeys(("num_workers", "dataloader_num_workers"), "data.workers"),
    **dict.fromkeys(("version", "conv_mode"), "data.template"),
    "run_name": "name",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.keep_best",
    "early_stopping_patience": "eval.patience",
    "eval_steps": "eval.every",
    **dict.fromkeys(("report_to", "wandb_project"), "log.wandb"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bits"), "quantize"),
    **dict.fromkeys(("bf16", "fp16", "precision"), "dtype"),
    "gradient_checkpointing": "memory.remat",
    **dict.fromkeys(("hub_model_id", "push"), "push_to_hub"),
}
"""Fields by the names that other trainers use, such as LLaVA's code, transformers and TRL."""


def suggest_field(message: str) -> str:
    """Returns an error message for an unknown field, with the name of the most similar field.

    Args:
        message: Text of an exception. If it is not Python's error about an unknown field, it is
            returned unchanged.
    """
    found = re.search(
        r"(?:(\w+)\.__init__\(\) )?got an unexpected keyword argument '(\w+)'", message
    )
    if not found:
        return message
    name, owners = found[2], {prefix: group for group, prefix in _GROUPS}
    groups = [prefix[:-1] for prefix, group in owners.items() if group.__name__ == found[1]]
    if (path := _known_as(name, *groups[:1])) is not None:
        prefix, dot, near = path.rpartition(".")
        return (
            f"there is no field '{name}'; did you mean '{near}' of {owners[prefix + dot].__name__}?"
        )
    classes = {*owners.values(), DataSet, Parts}
    meant = [group for group in classes if group.__name__ == found[1]] or classes
    fields = {field.name: group.__name__ for group in meant for field in dataclasses.fields(group)}
    near = difflib.get_close_matches(name, fields, n=1)
    hint = f"; did you mean '{near[0]}' of {fields[near[0]]}?" if near else ""
    return f"there is no field '{name}'{hint}"


def suggest_option(option: str) -> str:
    """Returns the error message for an unknown option, with the option that was probably meant.

    Args:
        option: Argument of the command that is not an option, for example "--lr" or "--lr=1".
    """
    if not option.startswith("-"):
        return f"unexpected argument {option!r}; the name of an option starts with --"
    name = option.partition("=")[0].lstrip("-").replace("-", "_")
    if name in _HINTS:
        return f"there is no option {option}; {_HINTS[name]}"
    if name in _PATHS and name.startswith("model."):
        return f"{option} can be given only if the config file sets `model`"
    group, _, leaf = name.rpartition(".")
    meant = _known_as(name) or _known_as(leaf, group)
    if meant is None:
        own = [path for path in _SUGGESTED if path.startswith(f"{group}.")]
        names = [*_SUGGESTED, *_LEAVES, *_OTHER_NAMES]
        near = difflib.get_close_matches(name, own, n=1) or difflib.get_close_matches(
            name, names, n=1
        )
        if not near:
            return f"there is no option {option}; --help lists all options"
        meant = _known_as(near[0]) or near[0]
    return f"there is no option {option}; did you mean --{meant.replace('_', '-')}?"


_RESUME = "the same command resumes a run that was stopped"
_DEVICES = "a run uses all devices that JAX sees, for example those in CUDA_VISIBLE_DEVICES"
_HINTS = {
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint"), _RESUME),
    **dict.fromkeys(("gpus", "gpu", "num_gpus", "n_gpu", "devices", "device"), _DEVICES),
    "image_size": "images have the size that the vision tower of the model needs",
}
"""What replaces options that other trainers have."""

_GROUPS = [found for found in field_groups(TrainConfig) if found[0] is not DataSet]  # no options
_PATHS = [prefix + field.name for group, prefix in _GROUPS for field in read_fields(group)]
_SUGGESTED = [path for path in _PATHS if not path.startswith(("init_from.", "model."))]
_LEAVES = {path.rpartition(".")[2]: path for path in reversed(_SUGGESTED)}  # the first path wins


def _known_as(name: str, group: str = "") -> str | None:
    """Returns the path of the field that has this name in another group or in another trainer.

    Args:
        name: Name of a field.
        group: Group in which the name was given. The field is first looked up in this group.
    """
    found = _OTHER_NAMES.get(name) or _LEAVES.get(name)
    leaf = (found or "").rpartition(".")[2]
    own = (f"{group}.{name}", f"{group}.{leaf}", f"data.{group}_{name}")
    return next((path for path in own if path in _SUGGESTED), found)
