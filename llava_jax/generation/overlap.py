"""Measures how many words an answer shares with the expected answer: the token F1 of SQuAD."""

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Chinese and Japanese are written without spaces, so each of their characters counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+")


def token_f1(given: str, expected: str) -> float:
    """Returns the F1 score of the words of an answer, from 0 to 1 (Rajpurkar et al., 2016).

    Precision is the share of the answer's words that are in the expected answer, and recall is the
    share of the expected words that are in the answer. Case, punctuation and articles are ignored.

    Args:
        given: Answer of the model.
        expected: Expected answer.
    """
    given_words, expected_words = _words(given), _words(expected)
    if not given_words or not expected_words:
        return float(given_words == expected_words)
    shared = sum((Counter(given_words) & Counter(expected_words)).values())
    return 2 * shared / (len(given_words) + len(expected_words))


def _words(text: str) -> list[str]:
    """Returns the words of a text as SQuAD's scorer compares them."""
    return _WORD.findall(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)))
