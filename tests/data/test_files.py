"""Remote files that cannot be reached are one line."""

from typing import Any

import pytest

from llava_jax.data.files import file_size, find_files, is_folder, list_folder, open_file
from llava_jax.data.sources import load_records
from llava_jax.errors import ConfigError


class Unreachable:
    """A file system without a network; the errors of real ones have no common class."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("Name or service not known")

        return fail


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda path: (Unreachable(), path))


@pytest.mark.parametrize("call", [file_size, find_files, is_folder, list_folder, open_file])
def test_an_error_of_a_file_system_is_an_oserror_that_names_the_file(call):
    with pytest.raises(OSError, match=r"hf://a/b cannot be reached \(RuntimeError: Name or serv"):
        call("hf://a/b")


@pytest.mark.parametrize("path", ["hf://datasets/a/b", "s3://a/*.json", "https://a/b.json"])
def test_data_that_cannot_be_reached_is_one_line(path: str):
    with pytest.raises(ConfigError, match=r"^data file .* cannot be reached .* and the network$"):
        load_records(path, "")
