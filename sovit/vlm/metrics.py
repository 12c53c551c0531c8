"""Rules by which an answer in words is right: one function a rule, from text to a number between 0 and 1.

They follow the evaluation scripts that published scores come from, their quirks included, for a score by a kinder rule
cannot be compared. A quirk that is kept is named where it stands. tests/test_metrics.py holds each rule to values that
lmms-eval 0.7.3 gave.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

# VQA: ten annotators, soft accuracy ----------------------------------------------------------------------------------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # these alone: $ % & : ' and the rest stay
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
"""
# the official table: each of these with one apostrophe left out; and one entry that stands the wrong way round there
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


@lru_cache(1 << 16)  # of a set's millions of answers most are a few thousand words
def normalise(text: str) -> str:
    """An answer as the EvalAI server of VQA, TextVQA and VizWiz compares it (mmf, pythia/tasks/processors.py).

    Two quirks of the original are kept. Its pattern for a full stop has a mistyped look-behind that always holds, so that
    a stop stays before a digit and goes everywhere else, "3." included; and it passes re.UNICODE (32) where `re.sub`
    takes a count, so that of more than 32 stops the last ones stay.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        bare = bare.replace(mark, "" if beside_space else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=int(re.UNICODE))
    words = [NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of VQA (Antol et al. 2015): the mean of min(1, matches / 3) over all subsets that leave one answer out.

    Of ten answers 1, 2, 3, 4 or more alike count 0.3, 0.6, 0.9, 1. Both sides are normalised, always; the official
    VQAv2 script does so only where the ten answers are not all the same.
    """
    said, given = normalise(prediction), [normalise(answer) for answer in answers]
    matches = given.count(said)
    return sum(min(1.0, (matches - (answer == said)) / 3) for answer in given) / len(given)


# charts, documents ---------------------------------------------------------------------------------------------------


def relaxed(prediction: str, target: str, tolerance: float = 0.05) -> float:
    """Relaxed accuracy of ChartQA (2203.10244, section 5.1): a number within 5 % of the target, other text to the letter.

    As everyone computes it: "50%" is 0.5, "1,000" is no number, a target of 0 is compared as text, and a year is a number
    too (2000 counts as 2010).
    """
    said, wanted = _number(prediction), _number(target)
    if said is not None and wanted:
        return float(abs(said - wanted) / abs(wanted) <= tolerance)
    return float(prediction.lower() == target.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity (1905.13648) to the nearest answer, 0 below the threshold.

    The distance is of the lower-cased texts with single spaces, the length that divides it of the texts as they are, as
    the usual scripts have it.
    """
    best = 0.0
    for answer in answers:
        longest = max(len(answer), len(prediction))
        near, far = (" ".join(text.lower().split()) for text in (answer, prediction))
        best = max(best, 1 - levenshtein(near, far) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """Fewest single letters to insert, delete or replace that make `a` into `b`."""
    row = list(range(len(a) + 1))  # distances of every prefix of a to the part of b read so far
    for j, letter in enumerate(b, 1):
        before, row[0] = row[0], j
        for i, other in enumerate(a, 1):
            before, row[i] = row[i], min(row[i] + 1, row[i - 1] + 1, before + (letter != other))
    return row[-1]


def exact_match(prediction: str, target: str) -> float:
    """Whether the texts agree but for case, punctuation and spaces, as GQA is scored."""
    return float(_plain(prediction) == _plain(target))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


# yes or no -----------------------------------------------------------------------------------------------------------


def yes_or_no(text: str) -> tuple[str, bool]:
    """POPE's own reading of an answer (2305.10355, evaluate.py), and whether the text did say one of the two.

    Read is what stands before the first full stop, without commas; "no" if one of its words is No, no or not, else "yes",
    whatever it says, an empty answer too: hence the second value, False where neither yes, no nor not is a word of it.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    said = "no" if {"No", "no", "not"} & set(words) else "yes"
    return said, said == "no" or "yes" in re.findall(r"\w+", text.split(".")[0].lower())


def yes_no_rates(
    said_yes: np.ndarray, is_yes: np.ndarray, weights: np.ndarray | None = None, among: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """accuracy, precision, recall, f1 and yes_ratio of predictions, "yes" being the positive class.

    said_yes [n] and is_yes [n] are boolean; for weights and among see `total`, the values are scalars or [R]. A rate of
    nothing (no "yes" said) is 0, of no questions at all nan. `yes_ratio` is of what was predicted: some harnesses give
    that of the right answers under this name, one half whatever the model does.
    """

    def count(which: np.ndarray) -> np.ndarray:
        return total(which, weights, among)

    num, hit, said, there = (count(which) for which in (said_yes | True, said_yes & is_yes, said_yes, is_yes))
    rates = {
        "accuracy": share(count(said_yes == is_yes), num),
        "precision": share(hit, said),
        "recall": share(hit, there),
        "f1": share(2 * hit, said + there),
        "yes_ratio": share(said, num),
    }
    return {name: np.where(num > 0, rate, np.nan) for name, rate in rates.items()}


def share(part: np.ndarray, whole: np.ndarray, of_nothing: float = 0.0) -> np.ndarray:
    """part / whole, and `of_nothing` where the whole is 0."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), of_nothing)


# option letters ------------------------------------------------------------------------------------------------------


def option_letter(text: str, num_options: int = 4, options: Sequence[str] = ()) -> str | None:
    """The option that an answer names, "A" .. ; None where it names none, or several.

    The first of these that holds: the letter alone; the answer begins with "B.", "B)", "B:" or "B,"; it has one letter
    in brackets; it says "answer is B", "answer: B" or "option B"; it is the text of one option, or has it in it.
    A capital A that begins a sentence ("A dog") is no letter; scripts that look at the first character take it for one.
    """
    letters = "".join(chr(ord("A") + i) for i in range(num_options))
    text = text.strip()
    if re.fullmatch(f"[{letters}]", alone := text.strip(" .,:;()[]*\"'").upper()):
        return alone
    if found := re.match(rf"[*\"']*([{letters}])\**[.):,](?=\s|\*|$)", text):
        return found[1]
    for pattern in (rf"\(([{letters}])\)", rf"(?i:\banswer(?:\s+is|:)|\boption)[\s:*(\"']*([{letters}])\b"):
        if named := set(re.findall(pattern, text)):
            return named.pop() if len(named) == 1 else None
    return _option_told(text, options)


def _option_told(text: str, options: Sequence[str]) -> str | None:
    said = f" {_plain(text)} "
    plain = [_plain(option) for option in options]
    found = [i for i, option in enumerate(plain) if option and f" {option} " in said]
    # of "cat" and "black cat" the longer one is meant
    meant = [i for i in found if not any(i != j and plain[i] != plain[j] and plain[i] in plain[j] for j in found)]
    return chr(ord("A") + meant[0]) if len(meant) == 1 else None


# means ---------------------------------------------------------------------------------------------------------------


def total(values: np.ndarray, weights: np.ndarray | None = None, among: np.ndarray | None = None) -> np.ndarray:
    """Sum of values [n], each counted weights [n] or [R, n] times (once if not given): a scalar or [R].

    among [n]: boolean, the ones that count at all.
    """
    values = np.asarray(values, float) if among is None else np.asarray(values, float) * among
    return values.sum() if weights is None else np.asarray(weights, float) @ values


def mean(scores: np.ndarray, weights: np.ndarray | None = None, among: np.ndarray | None = None) -> np.ndarray:
    """Mean of scores [n], a scalar or [R] (see `total`); of none nan."""
    return share(total(scores, weights, among), total(np.ones(len(scores)), weights, among), np.nan)


def by_group(
    measure: Callable[..., np.ndarray], groups: Sequence[str], *columns: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """`measure(*columns, weights, among)` among the rows of each group, in the order of the groups' names."""
    names = np.asarray(groups)
    return {str(name): measure(*columns, weights, names == name) for name in np.unique(names)}


def macro(groups: dict[str, np.ndarray]) -> np.ndarray:
    """Mean over groups, each counted once however many questions it has; one without any (nan) is left out."""
    values = np.array(list(groups.values()))
    there = ~np.isnan(values)
    return share(np.where(there, values, 0).sum(0), there.sum(0), np.nan)
