"""Rules of scoring, against values that lmms-eval 0.7.3 gave, and the scripts that published scores come from."""

import numpy as np
import pytest

from sovit.vlm import metrics

NORMALISED = {
    "Yes.": "yes",
    "a red car": "red car",
    "Two": "2",
    "it's": "it 's",
    "dont": "don't",
    "1,000": "1000",
    "3.50 m": "3.50 m",
    "  The Cat ": "cat",
    "ten\nfive": "10 5",
    "U.S.A": "usa",
    "none": "0",
    "10:30": "10:30",
    "isnt it": "isn't it",
    "$5.00": "$5.00",
    "5%": "5%",
    "left-hand": "left hand",
    "no, thanks": "no thanks",
    "black & white": "black & white",
}


@pytest.mark.parametrize("text", NORMALISED)
def test_normalise_as_evalai_does(text):
    assert metrics.normalise(text) == NORMALISED[text]


def test_quirks_of_the_original_are_kept():
    assert metrics.normalise("3. 5") == "3 5" and metrics.normalise("a.5") == "a.5"
    assert metrics.normalise("x" + "." * 40 + "y") == "x" + "." * 8 + "y"  # the first 32 stops go, the others stay
    assert (
        metrics.normalise("left- hand") == "left hand"
        and metrics.normalise("up-down left- right") == "updown left right"
    )
    assert metrics.normalise("somebody'd") == "somebodyd"
    assert metrics.normalise("lets go she's") == "lets go she 's"
    assert metrics.normalise("couldnt've couldn'tve yall'd've youre twas") == (
        "couldn't've couldn't've y'all'd've you're 'twas"
    )
    before = dict(metrics.NUMBERS)
    metrics.normalise("seldom met words")
    assert before == metrics.NUMBERS  # some copies of the script grow their table with every word


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_soft_accuracy_is_the_mean_over_leave_one_out_subsets(matches, score):
    answers = ["Two."] * matches + ["three"] * (10 - matches)
    assert metrics.vqa_accuracy("2", answers) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "target", "hit"),
    [
        ("5.2", "5", 1),
        ("5.25", "5", 1),
        ("5.26", "5", 0),
        ("4.75", "5", 1),
        ("4.74", "5", 0),
        ("50%", "0.5", 1),
        ("0.5", "50%", 1),
        ("50", "50%", 0),
        ("1,000", "1000", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Yes", "yes", 1),
        ("2000", "2010", 1),  # a year is a number too
    ],
)
def test_relaxed(prediction, target, hit):
    assert metrics.relaxed(prediction, target) == hit


@pytest.mark.parametrize(
    ("target", "prediction", "score"),
    [
        ("hello", "helo", 0.8),
        ("hello", "HELLO ", 1.0),
        ("abc", "xyz", 0),
        ("March 5", "march 5, 1999", 0.538),
        ("ab cd", "abcd", 0.8),
        ("a  b", "a b", 1.0),
    ],
)
def test_anls(target, prediction, score):
    assert metrics.anls(prediction, [target]) == pytest.approx(score, abs=5e-4)
    assert metrics.anls(prediction, ["zzzzzzzzzzzzzzzz", target]) == pytest.approx(
        score, abs=5e-4
    )  # the nearest counts


def test_anls_is_0_below_the_threshold_not_at_it():
    assert metrics.anls("ab", ["abcd"]) == 0.5 and metrics.anls("a", ["abc"]) == 0


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("", "", 0)]
)
def test_levenshtein(a, b, distance):
    assert metrics.levenshtein(a, b) == metrics.levenshtein(b, a) == distance


def test_exact_match_ignores_case_and_punctuation():
    assert metrics.exact_match("To the left.", "to the left") == 1 and metrics.exact_match("left", "to the left") == 0


# yes or no


@pytest.mark.parametrize(
    ("text", "said", "clear"),
    [
        ("yes", "yes", True),
        ("yes.", "yes", True),  # lmms-eval scores this one and the next 0
        ("Yes, there is", "yes", True),
        ("No", "no", True),
        ("No, there is not.", "no", True),
        ("There is not a dog. Yes.", "no", True),  # what stands before the first full stop
        ("A dog. No.", "yes", False),
        ("a dog", "yes", False),
        ("", "yes", False),
        ("NO", "yes", False),  # a quirk: the three words and no others
        ("nothing", "yes", False),
    ],
)
def test_yes_or_no_by_the_original_rule(text, said, clear):
    assert metrics.yes_or_no(text) == (said, clear)


def test_rates_of_a_planted_table():
    """3 of 4 yes found, 2 of 6 no taken for yes: counted by hand."""
    is_yes = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    said = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], bool)
    rates = {name: float(value) for name, value in metrics.yes_no_rates(said, is_yes).items()}
    wanted = {"accuracy": 0.7, "precision": 0.6, "recall": 0.75, "f1": 2 * 0.6 * 0.75 / 1.35, "yes_ratio": 0.5}
    assert rates == pytest.approx(wanted)
    twice = metrics.yes_no_rates(np.tile(said, 2), np.tile(is_yes, 2))
    weighted = metrics.yes_no_rates(said, is_yes, np.array([np.ones(10), np.full(10, 2.0)]))
    for name, value in twice.items():
        assert weighted[name].tolist() == pytest.approx([float(value)] * 2)
    never = metrics.yes_no_rates(np.zeros(10, bool), is_yes)
    assert [float(never[name]) for name in ("precision", "recall", "f1", "yes_ratio")] == [0, 0, 0, 0]
    always = metrics.yes_no_rates(np.ones(10, bool), is_yes)
    assert float(always["yes_ratio"]) == 1  # of predictions; of the right answers it would be 0.4


# option letters

OPTIONS = ("a red ball", "the black cat", "a cat", "nothing")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" C. ", "C"),
        ("(D)", "D"),
        ("**A**", "A"),
        ("B. the black cat", "B"),
        ("B) because", "B"),
        ("A: red", "A"),
        ("I think (C) fits", "C"),
        ("(A) or (B)", None),
        ("The answer is D", "D"),
        ("Answer: B", "B"),
        ("the correct option C.", "C"),
        ("answer is a cat", "C"),
        ("A dog runs", None),  # an article, no letter
        ("apple", None),
        ("E", None),
        ("the black cat", "B"),
        ("It shows a red ball.", "A"),
        ("a cat, or nothing", None),
        ("", None),
    ],
)
def test_option_letter_by_priority(text, letter):
    assert metrics.option_letter(text, 4, OPTIONS) == letter


def test_option_text_within_another():
    assert metrics.option_letter("the black cat", 3, ("black cat", "cat", "the dog")) == "A"
    assert metrics.option_letter("cat", 2, ("same cat", "same cat")) is None


# means


def test_macro_counts_each_group_once():
    scores, groups = np.array([1.0, 1, 1, 0]), ["x", "x", "x", "y"]
    found = metrics.by_group(metrics.mean, groups, scores)
    assert {name: float(value) for name, value in found.items()} == {"x": 1, "y": 0}
    assert metrics.macro(found) == 0.5 and metrics.mean(scores) == 0.75
    weights = np.array([[1.0, 1, 1, 3], [0, 0, 0, 1]])
    assert metrics.mean(scores, weights).tolist() == [0.5, 0]


def test_a_group_that_a_draw_left_out_does_not_count():
    scores, groups = np.array([1.0, 1, 0]), ["x", "x", "y"]
    found = metrics.by_group(metrics.mean, groups, scores, weights=np.array([[1.0, 2, 0], [1, 0, 1]]))
    assert metrics.macro(found).tolist() == [1, 0.5]
    none = metrics.yes_no_rates(np.array([True]), np.array([True]), np.array([0.0]))
    assert all(np.isnan(value) for value in none.values())
