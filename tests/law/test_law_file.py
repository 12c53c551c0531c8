"""A law.json is read completely or refused in one line that names the field."""

import json

import numpy as np
import pytest

from sovit import UserError
from sovit.law.fit import fit
from sovit.law.fitted_law import Fit
from sovit.law.geometry import Geometry
from sovit.predict.recommend import best_shape


@pytest.fixture(scope="module")
def law():
    """A planted law in which depth has no effect."""
    rng = np.random.default_rng(0)
    width, depth, mlp_dim = (rng.choice(v, 40) for v in ([64, 128, 256, 512], [2, 4, 8, 16], [128, 512, 1024, 2048]))
    images = rng.choice([1e5, 1e6, 1e7], 40)
    y = 0.2 + 3 * width**-0.6 + 4 * mlp_dim**-0.5 + 40 * images**-0.4
    columns = dict(width=width, depth=depth, mlp_dim=mlp_dim, num_examples=images)
    held = dict(patch_size=16, image_size=64, head_dim=64)
    forward = Geometry(**held).flops({n: x.astype(float) for n, x in columns.items()}, head=False)
    return fit("joint", columns | dict(compute=forward * images), y, geometry=held)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("objective",), float("nan"), "objective is nan, no finite number"),
        (("model", "theta", 0), 1e308, r"model.theta\[0\] is 1e\+308, no finite number"),
        (("model", "theta", 0), "x", r'model.theta\[0\] is "x", not of type float'),
        (("model", "theta"), [1.0], "its 1 parameters, their names and draws differ in number"),
        (("model", "dims"), ["height"], "data.grid lacks values above 0 for a dimension"),
        (("num_rows",), 1.5, "num_rows is 1.5, not of type int"),
        (("num_rows",), True, "num_rows is true, not of type int"),
        (("noise",), [], r"noise is \[\], not an object"),
        (("noise", "sd"), -1.0, "noise.sd=-1.0 .* cannot be"),
        (("noise", "sd"), None, "noise.sd is null, not of type float"),
        (("form",), "shifted", "form='shifted' is unknown; choose one of"),
        (("data", "grid", "width"), [], "data.grid lacks values above 0 for a dimension"),
    ],
)
def test_a_wrong_field_of_a_law_is_named(law, path, value, said):
    body = json.loads(law.to_json())
    part = body
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(UserError, match=said) as caught:
        Fit.from_json(json.dumps(body))
    assert "sovit fit" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "[]", "3", "null", "{", '{"form": "joint"}'])
def test_what_is_no_law_is_refused_with_the_remedy(text):
    with pytest.raises(UserError, match="not a law.json .*write one with `sovit fit LEDGER"):
        Fit.from_json(text)


def test_a_law_survives_its_file(law):
    assert Fit.from_json(law.to_json()).to_json() == law.to_json()


def test_a_dimension_without_effect_is_held_before_the_others_are_optimised(law):
    found = best_shape(law, 1e15)
    assert law.params["A_depth"] == 0 and found.optimum["depth"].estimate == pytest.approx(2)
    assert 0 <= found.rounding.estimate < 0.01
    assert found.shape.width == pytest.approx(found.optimum["width"].estimate, rel=0.5)


def test_every_field_that_is_missing_or_of_another_kind_is_refused_or_read(law):
    """No traceback, whatever stands in whatever place."""
    body = json.loads(law.to_json())
    paths = [(key, inner) for key, part in body.items() for inner in (part if isinstance(part, dict) else (None,))]
    for key, inner in paths:
        for value in (None, "x", float("inf"), [], {}, -1):
            changed = json.loads(json.dumps(body))
            (changed if inner is None else changed[key])[key if inner is None else inner] = value
            try:
                Fit.from_json(json.dumps(changed))
            except UserError as error:
                assert "\n" not in str(error)
