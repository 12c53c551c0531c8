"""Released systems as tables of dimensions: counts against transformers' own classes, shapes, the command."""

import json
from functools import cache

import pytest
from parity_table import SYSTEMS_TABLE, systems_row

from sovit import UserError
from sovit.cli.main import main
from sovit.spec.named_shapes import TIMM_SHAPES
from sovit.vlm import systems as show
from sovit.vlm.projectors import PROJECTORS
from sovit.vlm.systems import OUR_TOWERS, SYSTEMS, build, build_reference, find, num_params

built = cache(lambda name: build(find(name)))
described = cache(show.describe)
TRACED = ["nanovlm-222m", "internvl3-1b", "llava-1.5-7b", "gemma3-4b"]  # one of each kind of encoder and model

# millions: whole, encoder, projector; built once before and apart from this code, from the released configs
MILLIONS = {
    "smolvlm-256m": (256.5, 86.4, 7.08),
    "smolvlm-500m": (507.5, 86.4, 11.8),
    "smolvlm-2.2b": (2246.8, 413.0, 21.2),
    "idefics2-8b": (8402.8, 417.8, 91.75 + 651.5),
    "idefics3-8b": (8462.1, 412.9, 18.9),
    "llava-1.5-7b": (7063.4, 303.5, 20.98),
    "llava-1.5-13b": (13351.5, 303.5, 31.5),
    "gemma3-4b": (4300.1, 416.9, 2.95),
    "gemma3-12b": (12187.3, 416.9, 4.42),
    "gemma3-27b": (27432.4, 416.9, 6.19),
    "internvl3-1b": (
        802.2 + 0.07,
        303.94 + 0.07,
        4.48,
    ),  # there without the biases of q, k and v, which the release has
}


@pytest.mark.parametrize("name", TRACED)
def test_the_committed_table_is_what_is_counted(name):
    rows = {row["system"]: row for row in json.loads(SYSTEMS_TABLE.read_text())["rows"]}
    assert rows[name] == systems_row(described(name)) and set(rows) == set(SYSTEMS)
    assert all(row["reference"] in (None, row["total"]) for row in rows.values())


@pytest.mark.parametrize("name", SYSTEMS)
def test_counts_equal_an_independent_build(name):
    system, modules = find(name), built(name)
    total = num_params(modules)
    reference = build_reference(system)
    if reference is not None:
        assert total == num_params(reference)
    elif system.stated_params:
        assert total == system.stated_params
    else:
        assert name == "nanovlm-460m"  # SigLIP2-B/16-512 + SmolLM2-360M with 66 words more + 12288 x 960
        assert total == 86_433_024 + (361_821_120 + 66 * 960) + 12_288 * 960
    if name in MILLIONS:
        found = [total / 1e6, num_params(modules["vision"]) / 1e6, num_params(modules["projector"]) / 1e6]
        for value, said in zip(found, MILLIONS[name], strict=True):
            assert value == pytest.approx(said, abs=0.06)


@pytest.mark.parametrize("name", [n for n, s in SYSTEMS.items() if s.tower in OUR_TOWERS])
def test_siglip_is_counted_in_closed_form_too(name):
    assert num_params(built(name)["vision"]) == find(name).shape.num_params


def test_the_shapes_are_those_of_published_encoders():
    published = TIMM_SHAPES["vit_so400m_patch14_siglip_384"]
    assert find("smolvlm-2.2b").shape == published.replace(pool="none")
    assert find("nanovlm-222m").shape == TIMM_SHAPES["vit_base_patch16_siglip_224"].replace(pool="none")


def test_every_projector_of_a_system_is_in_the_table_and_has_words():
    assert {s.projector for s in SYSTEMS.values()} == set(PROJECTORS) - {"linear"}
    assert set(show.TABLES["projectors"]) == set(PROJECTORS)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_tree_adds_up_at_every_level(name):
    for part in show.PARTS:
        nodes = show.tree(built(name)[part], part)
        assert nodes[0].params == num_params(built(name)[part])
        for i, node in enumerate(nodes):
            below = []
            for other in nodes[i + 1 :]:
                if other.level <= node.level:
                    break
                below += [other.params] * (other.level == node.level + 1)
            assert not below or sum(below) == node.params, node
        tied = [n.name for n in nodes if not n.params]
        assert tied == (["lm_head"] if part == "language_model" and find(name).text["tie_word_embeddings"] else [])
        depth = {"vision": find(name).shape.depth, "language_model": find(name).text["num_hidden_layers"]}
        assert [n.repeats for n in nodes if n.repeats > 1] == [depth.get(part, 3)] * (part in depth or len(nodes) > 9)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("nanovlm-222m", [(3, 224, 224), (196, 768), (196, 768), (196, 768), (49, 576), (81, 576), (81, 49152)]),
        ("internvl3-1b", [(3, 448, 448), (1024, 588), (1025, 1024), (1024, 1024), (256, 896), (288, 896), (288, 151674)]),
        ("llava-1.5-7b", [(3, 336, 336), (576, 588), (577, 1024), (576, 1024), (576, 4096), (608, 4096), (608, 32064)]),
        ("gemma3-4b", [(3, 896, 896), (4096, 588), (4096, 1152), (4096, 1152), (256, 2560), (288, 2560), (288, 262208)]),
    ],
)  # fmt: skip
def test_shapes_of_the_stages(name, shapes):
    assert [tuple(shape[1:]) for shape in described(name)["stages"].values()] == shapes


@pytest.mark.parametrize("name", TRACED)
def test_one_system_in_words_fits_a_terminal(name):
    text = show.describe_text(described(name))
    assert max(len(line) for line in text.splitlines()) <= 120 and text.count("\n") < 60
    assert f"{described(name)['num_params']['total']:,}" in text
    assert text.splitlines()[-1].split()[3] == "equal"
    assert json.loads(json.dumps(described(name))) == described(name)


def test_a_total_that_differs_is_told():
    found = dict(described("nanovlm-222m"))
    found["reference"] = dict(total=1, by="another", equal=False)
    assert "NOT EQUAL" in show.describe_text(found)


def test_the_command_compares_all(capsys, monkeypatch):
    monkeypatch.setattr(show, "build", lambda system: next(built(n) for n, s in SYSTEMS.items() if s is system))
    assert main(["vlm", "show", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["system"] for row in rows} == set(SYSTEMS)
    totals = [row["num_params"]["total"] for row in rows]
    assert totals == sorted(totals)
    tokens = {row["system"]: row["tokens_per_tile"] for row in rows}
    assert (tokens["nanovlm-222m"], tokens["smolvlm-2.2b"], tokens["idefics3-8b"], tokens["gemma3-27b"]) == (
        49,
        81,
        169,
        256,
    )
    shares = {row["system"]: row["projector_share"] for row in rows}
    assert max(shares, key=shares.get) == "idefics2-8b" and min(shares, key=shares.get) == "gemma3-27b"
    text = show.compare_text(rows)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert all(text.count(f"\n{name} ") == 2 for name in SYSTEMS)


def test_an_unknown_system_is_one_line_that_names_the_known(capsys):
    assert main(["vlm", "show", "llava"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown system 'llava'" in error and "llava-1.5-7b" in error
    with pytest.raises(UserError):
        find("")
