"""What names say: captions and attributes of hand-picked names."""

import pytest

from sovit.data.icons.text import ATTRIBUTES, describe

# enough names of each set to tell a mark of style from a word of a name
BACKGROUND = [f"weights:thing{i}-{style}" for i in range(9) for style in ("bold", "light", "round")]
BACKGROUND += [f"sized:thing{i}-{size}-filled" for i in range(9) for size in (16, 24)]
BACKGROUND += [f"plain:thing{i}" for i in range(60)]
BACKGROUND += [f"shapes:round-thing{i}" for i in range(9)]


@pytest.mark.parametrize(
    ("title", "concept", "caption", "attributes"),
    [
        ("plain:cloud-arrow-up-outline", "cloud", "cloud arrow up", {"style": ["outline"], "direction": ["up"]}),
        ("weights:traffic-light-bold", "traffic", "traffic", {"style": ["light", "bold"]}),  # the set says light
        ("plain:traffic-light", "traffic", "traffic light", {}),
        ("weights:bell-off-light", "bell", "bell off", {"style": ["light"], "state": ["off"]}),
        ("sized:calendar-plus-24-filled", "calendar", "calendar plus", {"style": ["filled"], "state": ["plus"]}),
        ("sized:number-4-24-filled", "number", "number 4", {"style": ["filled"]}),
        ("plain:heading-4", "heading", "heading 4", {}),
        ("plain:plus-circle", "plus", "plus circle", {"enclosure": ["circle"]}),  # of what it is, it has no state
        ("plain:arrow-down-left-square", "arrow", "arrow down left square",
         {"direction": ["down", "left"], "enclosure": ["square"]}),
        ("shapes:round-lock", "lock", "lock", {"style": ["rounded"]}),
        ("icon-park-solid:lightbulb", "lightbulb", "lightbulb", {"style": ["filled"]}),
        ("weights:bold", "bold", "bold", {}),  # a name of one word is what it shows
    ],
)  # fmt: skip
def test_what_a_name_says(title, concept, caption, attributes):
    rows = [(background, "thing", "train") for background in BACKGROUND] + [(title, concept, "val")]
    told = describe(rows)[-1]
    assert (told["set"], told["name"], told["concept"], told["split"]) == (*title.split(":"), concept, "val")
    assert told["caption"] == caption
    assert {kind: told[kind] for kind in ATTRIBUTES if told[kind]} == attributes
