import pytest

from llava_jax.config import LlmConfig, ModelConfig, VisionConfig
from llava_jax.models import paths
from llava_jax.pretrained import checkpoint_layouts as layouts

CONFIG = ModelConfig(
    vision=VisionConfig(num_hidden_layers=4), llm=LlmConfig(num_hidden_layers=2)
)  # three vision layers reach the feature
EXAMPLES = {
    "llm.layers.1.self_attn.q_proj.weight": {
        "A": "language_model.model.layers.1.self_attn.q_proj.weight",
        "B": "model.language_model.layers.1.self_attn.q_proj.weight",
        "C": "model.language_model.layers.1.self_attn.q_proj.weight",
        "D": "language_model.model.layers.1.self_attn.q_proj.weight",
        "E": "model.layers.1.self_attn.q_proj.weight",
        "H": "llm.model.layers.1.self_attn.q_proj.weight",
    },
    "llm.lm_head.weight": {
        "A": "language_model.lm_head.weight",
        "B": "lm_head.weight",
        "C": "lm_head.weight",
        "D": "language_model.lm_head.weight",
        "E": "lm_head.weight",
        "H": "llm.lm_head.weight",
    },
    "vision.pre_layrnorm.bias": {
        "A": "vision_tower.vision_model.pre_layrnorm.bias",
        "B": "model.vision_tower.vision_model.pre_layrnorm.bias",
        "C": "model.vision_tower.pre_layrnorm.bias",
        "D": "vision_tower.pre_layrnorm.bias",
        "E": "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
        "H": "visual_encoder.vision_model.pre_layrnorm.bias",
    },
    "projector.linear_2.bias": {
        "A": "multi_modal_projector.linear_2.bias",
        "B": "model.multi_modal_projector.linear_2.bias",
        "C": "model.multi_modal_projector.linear_2.bias",
        "D": "multi_modal_projector.linear_2.bias",
        "E": "model.mm_projector.2.bias",
        "H": "projector.model.2.bias",
    },
}
LLAVA = dict(zip("ABCDEH", layouts.LLAVA_LAYOUTS, strict=True))


@pytest.mark.parametrize("name", LLAVA)
def test_names_go_there_and_back(name):
    for parameter, expected in EXAMPLES.items():
        assert LLAVA[name].file_name(parameter) == expected[name]
        assert LLAVA[name].parameter(expected[name]) == parameter


@pytest.mark.parametrize("name", LLAVA)
@pytest.mark.parametrize("tied", [False, True])
def test_a_layout_is_recognised_by_its_names(name, tied):
    names = [LLAVA[name].file_name(p) for p in EXAMPLES if not (tied and "lm_head" in p)]
    assert layouts.recognise(names) == LLAVA[name]
    assert layouts.recognise([*names, "something.else"]) == LLAVA[name]
    assert layouts.recognise(reversed(names)) == LLAVA[name]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["vision_model.pre_layrnorm.bias", "text_model.embeddings.position_ids"],
            layouts.CLIP,
        ),
        (["pre_layrnorm.bias", "embeddings.class_embedding"], layouts.CLIP_BARE),
    ],
)
def test_vision_towers(names, expected):
    assert layouts.recognise(names, layouts.VISION_LAYOUTS) == expected


@pytest.mark.parametrize(
    "name",
    [
        "linear_1.weight",
        "multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_1.weight",
        "model.mm_projector.0.weight",
        "mm_projector.0.weight",
        "model.0.weight",
    ],
)
def test_projectors(name):
    layout = layouts.recognise([name], layouts.PROJECTOR_LAYOUTS)
    assert layout.parameter(name) == "projector.linear_1.weight"


def test_a_layout_has_the_parts_that_are_there():
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.mm_projector.0.weight"]
    layout = layouts.recognise(names)
    assert (layout.name, layout.parts(names)) == (
        layouts.LLAVA.name,
        {"llm", "projector"},
    )
    assert not layout.holds("vision.pre_layrnorm.bias")
    assert layouts.recognise(names[:2], layouts.LLM_LAYOUTS) == layouts.LLAMA


@pytest.mark.parametrize("names", [[], ["encoder.block.0.weight"], ["logit_scale"]])
def test_foreign_names_are_refused(names):
    with pytest.raises(layouts.LayoutError, match="fit none of the known layouts"):
        layouts.recognise(names)


@pytest.mark.parametrize(
    ("path", "layer", "parameter"),
    [
        ("llm.layers.mlp.up_proj.weight", 1, "llm.layers.1.mlp.up_proj.weight"),
        ("vision.encoder.layers.mlp.fc1.bias", 2, "vision.encoder.layers.2.mlp.fc1.bias"),
        ("vision.encoder.tail.mlp.fc1.bias", 0, "vision.encoder.layers.3.mlp.fc1.bias"),
    ],
)
def test_layers_are_stacked(path, layer, parameter):
    assert paths.is_stacked(path)
    assert paths.unstacked(path, layer, CONFIG) == parameter
    assert paths.stacked(parameter, CONFIG) == path


def test_what_is_not_a_layer_is_not_stacked():
    assert not paths.is_stacked("llm.embed_tokens.weight")
    assert paths.stacked("llm.norm.weight", CONFIG) == "llm.norm.weight"


@pytest.mark.parametrize(("layer", "used"), [(-1, 4), (-2, 3), (2, 2)])
def test_how_many_vision_layers_count(layer, used):
    config = ModelConfig(vision=CONFIG.vision, vision_feature_layer=layer)
    assert config.used_vision_layers == used
