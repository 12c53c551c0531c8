"""Which icons become which classes, on hand-written sets: no rendering, no files."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest
from icon_package import CONCEPTS, small_package

from sovit import UserError
from sovit.data.icons.labels import (
    BRANDS,
    NEVER,
    NUM_WORDS,
    RECIPE,
    SAME,
    VAL_SHARE,
    Icon,
    choose,
    content_words,
    find_concept,
    read_set,
    split_families,
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


def test_tables_of_words_do_not_contradict_each_other():
    concepts = set(SAME.values())
    assert not concepts & set(SAME), "a word is counted as one that is itself counted as another"
    assert not concepts & (NEVER | BRANDS), "a word is counted as one that is never a label"
    assert not set(SAME) & (NEVER | BRANDS), "a word that is counted as another cannot be forbidden"


def test_word_lists_are_those_of_the_committed_results():
    """Where a list has to change, RECIPE must too."""
    everything = repr((RECIPE, NUM_WORDS, sorted(SAME.items()), [], sorted(NEVER), sorted(BRANDS), 0, 0))
    assert hashlib.sha256(everything.encode()).hexdigest()[:12] == "3c56206ecaca"


def test_more_classes_than_concepts_are_refused():
    with pytest.raises(UserError, match="num_classes=41 is more than the 40 concepts found"):
        choose(read_all(), 41)


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
