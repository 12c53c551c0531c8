"""Which icons become which classes, on hand-written sets: no rendering, no files."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest
from icon_package import CONCEPTS, small_package

from sovit import UserError
from sovit.data.icons.labels import (
    NARROW,
    VAL_SHARE,
    WIDE,
    Icon,
    choose,
    content_words,
    find_concept,
    read_set,
    split_families,
    word_set,
)


def read_all() -> list[Icon]:
    return [icon for data in small_package() for icon in read_set(data)]


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("calendar-off-outline", "calendar"),
        ("calendar-24-filled", "calendar"),
        ("plus-circle", "plus"),
        ("folder-plus", "folder"),
        ("house", "home"),
        ("folder-music", None),  # two concepts
        ("unheard-plus", None),  # a noun that is no concept: the plus is not the subject
        ("google-calendar", None),
        ("circle", None),
    ],
)
def test_concept_of_a_name(name, concept):
    vocabulary = frozenset({"calendar", "plus", "folder", "home", "music"})
    assert find_concept(content_words(name), vocabulary) == concept


@pytest.mark.parametrize(
    ("name", "narrow", "wide"),
    [
        ("plane", "plane", "airplane"),
        ("paper-plane", "plane", "send"),
        ("not-paper-planes", None, None),
        ("star-filled-loop", "loop", "star"),  # `loop` says that the drawing moves
        ("letter-q", "q", None),
        ("arrow-left", None, "arrow"),  # of two words of the vocabulary neither is the subject
        ("java", "java", None),
        ("sketch-diamond", None, None),
    ],
)
def test_a_thousand_classes_have_rules_of_their_own(name, narrow, wide):
    vocabulary = word_set("plane airplane send loop star q letter arrow left java sketch diamond")
    for by, concept in ((NARROW, narrow), (WIDE, wide)):
        allowed = vocabulary - by.never - by.brands
        assert find_concept(content_words(name, by), allowed, by) == concept, by.recipe


def test_tables_of_words_do_not_contradict_each_other():
    for by in (NARROW, WIDE):
        concepts = set(by.same.values()) | set(by.phrases.values())
        assert not concepts & set(by.same), "a word is counted as one that is itself counted as another"
        assert not concepts & (by.never | by.brands), "a word is counted as one that is never a label"
        assert not set(by.same) & (by.never | by.brands), "a word that is counted as another cannot be forbidden"


@pytest.mark.parametrize("by, frozen", [(NARROW, "3c56206ecaca"), (WIDE, "0606a460fbb6")], ids=["narrow", "wide"])
def test_word_lists_are_those_of_the_committed_results(by, frozen):
    """Where a list has to change, the recipe of its rules must too."""
    words = sorted(by.same.items()), sorted(by.phrases.items()), sorted(by.never), sorted(by.brands)
    everything = repr((by.recipe, by.num_words, *words, by.min_train, by.min_val))
    assert hashlib.sha256(everything.encode()).hexdigest()[:12] == frozen


def test_a_wide_choice_has_every_class_on_both_sides_of_the_split():
    families = [f"f{i}" for i in range(60)]
    val = split_families(Counter(families))
    icons = [
        Icon(f"{family}:{word}", family, "MIT", "A", "0 0 24 24", family + word)
        for family in families  # a name of two concepts has no label
        for word in ("seen", "seen-unseen" if family in val else "unseen")
    ]
    assert split_families(Counter(icon.family for icon in icons)) == val
    with pytest.raises(UserError, match="num_classes=201 is more than the 1 concepts found"):
        choose(icons, 201)
    assert choose(icons, 2)[1] == ["seen", "unseen"]  # the narrow rules do not ask


def test_licences_colours_logos_and_brands_are_left_out():
    read = read_all()
    assert {i.licence for i in read} == {"MIT", "Apache-2.0"}
    assert not {"beta-gpl", "beta-sharealike", "beta-colour", "beta-brands"} & {i.title.split(":")[0] for i in read}
    chosen, classes = choose(read, 40)
    assert classes == sorted(CONCEPTS)
    titles = {i.title for i in chosen}
    assert "alpha-more:thingaa-off-outline" in titles
    assert not titles & {"alpha-more:thingaa-thingab", "alpha-more:google-thingaa", "alpha-more:circle"}
    assert all(i.author == f"Author of {i.title.split(':')[0]}" for i in chosen)


def test_identical_drawings_are_kept_once_or_not_at_all():
    chosen, _ = choose(read_all(), 40)
    drawings = Counter((i.box, i.body) for i in chosen)
    assert set(drawings.values()) == {1}
    titles = {i.title for i in chosen}
    assert "alpha-set:thingab" in titles and "alpha-more:thingab-24" not in titles
    assert not titles & {"alpha-set:thingad", "alpha-more:thingac-off"}


def test_split_is_by_family_and_independent_of_the_order():
    counts = Counter({f"family{i}": 10 + i for i in range(60)} | {"giant": 5000})
    val = split_families(counts)
    assert val == split_families(Counter(dict(reversed(counts.items()))))
    assert "giant" not in val  # larger than a quarter of the validation set
    total = sum(counts.values())
    assert 0.5 * VAL_SHARE * total < sum(counts[f] for f in val) <= VAL_SHARE * total
    with pytest.raises(UserError, match="1 icon families cannot be split"):
        split_families(Counter(one=5))


def test_import_needs_only_the_standard_library():
    code = "import sys; import sovit.data.icons.labels; print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
