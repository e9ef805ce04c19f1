"""Weights and data that are not there are said all at once, and the hub is asked for neither."""

import dataclasses
from pathlib import Path

import pytest

from llava_jax.config import DataConfig, DataSet, Parts, TrainConfig, load_config
from llava_jax.errors import ConfigError
from llava_jax.pretrained import resolve
from llava_jax.training.check_sources import check_sources


@pytest.fixture(autouse=True)
def new_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "_download", None)


def refused(config: TrainConfig) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_sources(config)
    return str(error.value).splitlines()


def test_a_new_clone_says_what_a_preset_needs_and_how_to_go_on():
    assert refused(load_config("7b_lora")) == [
        "this run needs files that do not exist:",
        "  init_from 'runs/7b_pretrain': no such directory",
        "  data file data/llava_v1_5_mix665k.json: No such file or directory; check data.path",
        "  directory data does not exist; check data.image_root",
        "To continue without these weights:",
        "  --init-from llava-hf/llava-1.5-7b-hf starts from the published model",
        "  --config 7b_task_lora trains the published model on your own data",
        "  `llava-jax train --config 7b_pretrain` writes runs/7b_pretrain (stage 1)",
    ]


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("13b_full", ["llava-hf/llava-1.5-13b-hf", "13b_task ", "13b_pretrain` writes"]),
        ("7b_qlora_xtuner", ["llava-hf/llava-1.5-7b-hf", "7b_task_lora", "7b_pretrain_xtuner`"]),
        ("llama3_8b_qlora_1gpu", ["llama3_8b_pretrain_1gpu` writes"]),
        ("7b_pretrain", []),
    ],
)
def test_ways_on_are_those_that_there_are(name: str, ways: list[str]):
    lines = refused(load_config(name))
    start = lines.index("To continue without these weights:") + 1 if ways else len(lines)
    assert len(lines[start:]) == len(ways)
    assert all(way in line for way, line in zip(ways, lines[start:], strict=True))


def test_parts_are_checked_one_by_one():
    lines = refused(load_config("7b_pretrain"))
    assert "  init_from 'checkpoints/vicuna-7b-v1.5': no such directory" in lines
    assert "  init_from 'checkpoints/clip-vit-large-patch14-336': no such directory" in lines


def test_one_missing_file_is_one_line(tmp_path: Path):
    (tmp_path / "data.json").write_text("[]")
    config = TrainConfig("x", init_from="org/model", data=DataConfig("data.json", "pictures"))
    assert refused(config) == ["directory pictures does not exist; check data.image_root"]
    config = dataclasses.replace(config, data=DataConfig("data.json"))
    check_sources(config)
    made = dataclasses.replace(config, init_from="out/first", output_dir="out")
    assert refused(made) == ["init_from 'out/first': no such directory"]
    config = TrainConfig("x", init_from="org/model")
    assert refused(config) == ["data.path is not set; set it to a data file"]
    config = TrainConfig("x", data=DataConfig("data.json"))
    assert refused(config)[0].startswith("init_from and model are both None; set init_from to")


def test_what_is_not_used_is_not_checked_and_a_processor_is(tmp_path: Path):
    (tmp_path / "data.json").write_text("[]")
    data = DataConfig("data.json", eval_image_root="nowhere")
    config = TrainConfig("x", init_from="org/model", data=data)
    check_sources(config)
    made = dataclasses.replace(config, processor="tokens")
    assert refused(made) == ["processor 'tokens': no such directory"]
    mixture = (DataSet("data.json"),)
    data = DataConfig(mixture=mixture, image_root="nowhere")
    check_sources(dataclasses.replace(config, data=data))
    data = dataclasses.replace(data, eval_path="data.json")
    lines = refused(dataclasses.replace(config, data=data))
    assert lines == ["directory nowhere does not exist; check data.image_root"]


@pytest.mark.parametrize("path", ["easy_vqa:train", "hf:user/name", "s3://a/b.json", "a/*.parquet"])
def test_what_is_no_plain_path_is_not_checked(path: str):
    check_sources(TrainConfig("x", init_from="org/model", data=DataConfig(path, "gs://b/c")))


@pytest.mark.parametrize(
    "name", ["runs/7b_pretrain", "checkpoints/a", "./a/b", "/a/b", "a/b/c", "a", "a/b.pth", "~/a"]
)
def test_a_local_path_is_never_asked_of_the_hub(name: str):
    with pytest.raises(ConfigError, match="no such directory"):
        resolve.resolve(name)
    with pytest.raises(ConfigError, match="no such directory"):
        resolve.resolve(Parts(name, name))


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", "lmsys/vicuna-7b-v1.5"])
def test_a_hub_id_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(resolve, "_download", lambda name, *_, **__: asked.append(name) or tmp_path)
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setattr(resolve, "_as_parts", lambda path, read: path)
    resolve.resolve(name)
    assert asked == [name]
