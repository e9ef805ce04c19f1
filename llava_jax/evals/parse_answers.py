"""Parses answers like published scorers: texts for VQA, yes or no, letters and numbers.

Each function does exactly the same as one published scorer, including its peculiarities, because
scores can only be compared if they are computed in the same way. tests/parity compares the results
with the results of the original scorers.
"""

import re
from collections.abc import Collection

ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the original passes re.UNICODE, which is 32, as the count

# The next three tables are the VQA challenge's list of contractions. The words in the first table
# have one apostrophe, which may be missing in an answer.
_ONCE = (
    "'twas ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd "
    "he's how'd how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't "
    "not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd "
    "someone'll someone's something'd something'll that's there'd there're there's they'd they'll "
    "they're they've wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
)
# The words in the second table have two apostrophes, one of which may be missing.
_TWICE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll "
    "you'd've"
)
# The other contractions in the list, with the word that replaces each of them.
_ODD = {
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _without_apostrophe(word: str) -> list[str]:
    """Returns each form of a word that results from removing one apostrophe."""
    indices = [index for index, letter in enumerate(word) if letter == "'"]
    return [word[:index] + word[index + 1 :] for index in indices]


_CONTRACTIONS = _ODD | {
    short: word for word in (_ONCE + " " + _TWICE).split() for short in _without_apostrophe(word)
}


def normalise(text: str) -> str:
    """Normalizes an answer for comparison with other answers, like VQA's scorers.

    The result is in lower case and has no articles and almost no punctuation. Numbers up to ten are
    written as digits, and missing apostrophes of contractions are inserted. The rules are the same
    as in EvalAI's answer processor in M4C, which LLaVA uses for TextVQA and VQAv2.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = _strip_punctuation(text.strip().replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _strip_punctuation(text: str) -> str:
    """Removes each mark that occurs next to a space; replaces each other mark with a space."""
    stripped = text
    for mark in _PUNCTUATION:
        at_a_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if at_a_space else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def says_yes(text: str) -> bool:
    """Returns True unless the first sentence contains "no" or "not", like POPE's scorer."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def mme_label(text: str) -> str:
    """Returns the "yes" or "no" in the first four characters, else "other", like MME's scorer."""
    start = text.lower()[:4]
    return next((label for label in ("yes", "no") if label in start), "other")


def science_letter(text: str, letters: Collection[str]) -> str | None:
    """Returns the letter of the chosen option, like LLaVA's scorer for ScienceQA.

    Args:
        text: Answer of the model.
        letters: Letters of all options.

    Returns:
        The letter, or None if the answer does not name exactly one option.
    """
    if text in letters:
        return text
    if text[:1] in letters and text[1:3] == ". ":
        return text[0]
    said = re.findall(r"The answer is ([A-Z]).", text)
    return said[0] if len(said) == 1 else None


def first_letter(text: str, letters: Collection[str]) -> str | None:
    """Returns the letter that an answer starts with, such as "B", "(B)", "B." or "B: a dog".

    Args:
        text: Answer of the model.
        letters: Letters of the options of the question.

    Returns:
        The letter, or None if the answer does not start with the letter of an option.
    """
    found = re.match(r"\(?([A-Z])(?:\W|$)", text.strip())
    return found[1] if found and found[1] in letters else None


def to_number(text: str) -> float | None:
    """Returns the number in a text, or None if the text is not a number.

    A percentage is divided by 100.
    """
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
