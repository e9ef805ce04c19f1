"""Token F1: the words that two answers share."""

import pytest

from llava_jax.generation.overlap import token_f1


@pytest.mark.parametrize(
    ("given", "expected", "score"),
    [
        ("A red car.", "the red car", 1.0),
        ("a red car", "a blue car", 0.5),
        ("red", "a red car on the road", 2 * 1 * 0.25 / 1.25),
        ("red red red", "red", 0.5),
        ("car", "dog", 0.0),
        ("", "dog", 0.0),
        ("", "", 1.0),
        ("the", "a", 1.0),
        ("红色的车", "蓝色的车", 0.75),
        ("it is 红色", "红色", 2 * 0.5 * 1 / 1.5),
    ],
)
def test_f1_counts_shared_words(given: str, expected: str, score: float):
    assert token_f1(given, expected) == pytest.approx(score)
    assert token_f1(expected, given) == pytest.approx(score)
