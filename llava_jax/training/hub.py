"""Uploads the result of a run to the Hugging Face Hub."""

from pathlib import Path

from llava_jax.config import TrainConfig
from llava_jax.disk import replace_text
from llava_jax.distributed.multihost import barrier, is_main_process, say
from llava_jax.errors import ConfigError, RunError
from llava_jax.training.model_card import UNNAMED


def check_push(config: TrainConfig) -> None:
    """Checks, before a run begins, that its result can be uploaded, and creates the repository.

    A new repository is private. Only the main process asks the hub.

    Args:
        config: Config of the run.

    Raises:
        ConfigError: `push_to_hub` is not the name of a repository, the user is not logged in, the
            environment forbids the use of the hub, or the hub refuses the repository.
    """
    repo = config.push_to_hub
    if repo is None or not is_main_process():
        return
    # The package is imported only if it is needed, because its import is slow.
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub {repo!r} is not a name USER/NAME: {error}") from error
    if "/" not in repo:
        raise ConfigError(
            f"push_to_hub {repo!r} is not a name USER/NAME; put the name of the user or of the "
            "organization in front of it"
        )
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"push_to_hub {repo} needs the network, but HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE"
        )
    if get_token() is None:
        raise ConfigError(
            f"push_to_hub {repo} needs a login at the Hugging Face Hub; run `hf auth login`, or "
            "set HF_TOKEN to a token that may write"
        )
    try:
        HfApi().create_repo(repo, private=True, exist_ok=True)
    except Exception as error:  # the client's errors have no common class
        raise ConfigError(f"push_to_hub {repo}: the hub refuses it: {error}") from error


def push(config: TrainConfig) -> None:
    """Uploads the result of a finished run if `push_to_hub` is set. All processes must call this.

    The model card names the repository then. The upload can be repeated.

    Args:
        config: Config of the run.

    Raises:
        RunError: The result cannot be uploaded. The result itself is complete.
    """
    repo = config.push_to_hub
    if repo is None:
        return
    if is_main_process():
        from huggingface_hub import HfApi

        directory = config.export_dir
        say(f"uploading {directory} to {repo}")
        try:
            _name_in_card(directory / "README.md", repo)
            message = f"Upload {config.name}, trained with llava_jax"
            upload = HfApi().upload_folder
            made = upload(repo_id=repo, folder_path=directory, commit_message=message)
        except Exception as error:  # the client's errors have no common class
            raise RunError(
                f"{directory} is complete, but it cannot be uploaded to {repo}: {error}; the same "
                "command tries to upload it again"
            ) from error
        say(f"uploaded {directory} to {made.repo_url}")
    barrier()


def _name_in_card(card: Path, repo: str) -> None:
    """Puts the name of the repository in a card that was written without it; keeps the rest."""
    if card.is_file() and UNNAMED in (text := card.read_text(encoding="utf-8")):
        replace_text(card, text.replace(UNNAMED, repo))
