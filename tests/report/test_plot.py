"""Figures show the ledger's own points and the law's own curves; files are written and stable."""

import hashlib

import numpy as np
import planted_ledger as planted
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection

from sovit import UserError
from sovit.law import fit as law
from sovit.ledger.measurements import measurements
from sovit.predict import recommend as predict
from sovit.report import figures as plot
from sovit.report.facts import held_out
from sovit.report.figures import style


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return measurements([planted.write_ledger(tmp_path_factory.mktemp("plot") / "a.jsonl", planted.planted_rows())])


@pytest.fixture(scope="module")
def fit(data):
    return law.fit("bounded", data.columns, data.y, bootstrap=40, zero_line=data.zero_line)


def points(axis):
    """All scatter points of a panel [n, 2]."""
    return np.concatenate([c.get_offsets() for c in axis.collections if isinstance(c, PathCollection)])


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def sorted_rows(values):
    return values[np.lexsort(values.T[::-1])]


def test_points_by_dimension_are_the_ledgers_and_curves_the_laws(fit, data):
    figure = plot.fit_by_dimension(fit, data)
    assert [axis.get_xlabel() for axis in figure.axes] == ["width", "depth (blocks)", "MLP dim"]
    columns = data.columns
    for dim, axis in zip(fit.model.dims, figure.axes):
        others = [d for d in fit.model.dims if d != dim]
        mine = np.all([columns[d] == fit.data.centre[d] for d in others], axis=0)
        expected = np.column_stack([columns[dim][mine], data.y[mine]])
        assert np.array_equal(sorted_rows(points(axis)), sorted_rows(expected))
        curves = [line for line in axis.lines if len(line.get_xdata()) > 100]
        assert len(curves) == 4
        diamonds = [line for line in axis.lines if line.get_marker() == "D"]
        for diamond in diamonds:  # the minimum of one of the curves
            assert any(np.isclose(curve.get_ydata().min(), diamond.get_ydata()[0]) for curve in curves)
    # the curve of the centre's own budget passes the law's value there
    x, y = curves[-1].get_xdata(), curves[-1].get_ydata()
    centre = planted.CENTRE
    images = 1e12 / centre.train_flops_per_image(16)
    value = fit.predict(dict(width=[32], depth=[2], mlp_dim=[256], num_examples=[images]))[0]
    assert np.interp(np.log(256), np.log(x), y) == pytest.approx(value, rel=1e-3)


def test_isoflop_valleys_are_the_recommended_optima(fit, data):
    figure = plot.isoflop(fit, data)
    (axis,) = figure.axes
    expected = np.column_stack([data.columns["forward_flops"], data.y])
    assert np.array_equal(sorted_rows(points(axis)), sorted_rows(expected))
    valley = next(line for line in axis.lines if line.get_marker() == "D")
    for budget, loss in zip(planted.BUDGETS, valley.get_ydata()):
        assert loss == pytest.approx(predict.best_shape(fit, budget).optimum_loss, rel=2e-4)
    assert legend(figure)[:4] == [f"{b} training FLOPs" for b in ("3.2×10¹⁰", "10¹¹", "3.2×10¹¹", "10¹²")]


def test_optimal_shape_bands_hold_the_line_and_the_recommendation(fit):
    recommendation = predict.best_shape(fit, 3.16e12)
    figure = plot.optimal_shape(fit, recommendation)
    assert len(figure.axes) == 3
    for dim, axis in zip(fit.model.dims, figure.axes):
        star = next(line for line in axis.lines if line.get_marker() == "*")
        assert star.get_ydata()[0] == getattr(recommendation.shape, dim)
        assert len(axis.collections) == 2  # headline and pairs
        dashed, solid = (line for line in axis.lines if line.get_linewidth() > 1 and line.get_marker() == "None")
        slope = np.polyfit(np.log(solid.get_xdata()), np.log(solid.get_ydata()), 1)[0]
        assert slope == pytest.approx(fit.exponents[dim].estimate, rel=0.05)
        assert solid.get_xdata()[-1] == pytest.approx(fit.data.compute_range[1])
        assert dashed.get_xdata()[-1] > solid.get_xdata()[-1]
        low, high = axis.collections[1].get_paths()[0].get_extents().get_points()[:, 1]
        assert low < solid.get_ydata()[0] and high > dashed.get_ydata()[-1]


def test_statuses_stand_in_the_panel_titles(fit):
    import dataclasses

    exponents = dict(fit.exponents)
    for name, status in (("width", "edge"), ("depth", "unidentified")):
        exponents[name] = dataclasses.replace(exponents[name], status=status)
    titles = [a.get_title("left") for a in plot.optimal_shape(dataclasses.replace(fit, exponents=exponents)).axes]
    assert "edge" in titles[0] and "unidentified" in titles[1] and "90 %" in titles[2]


def test_residuals_are_measured_over_fitted(fit, data):
    figure = plot.residuals(fit, data)
    expected = 100 * np.log(data.y / fit.predict(data.columns))
    assert np.allclose(np.sort(points(figure.axes[0])[:, 1]), np.sort(expected))
    assert legend(figure)[:4] == ["centre", "width", "depth", "MLP dim"]


def test_extrapolation_has_a_panel_a_form(fit, data):
    scores = held_out({"bounded": fit}, "bounded", data)
    figure = plot.extrapolation(scores)
    assert [axis.get_title("left").splitlines()[0] for axis in figure.axes] == ["bounded", "compute only"]
    assert np.array_equal(points(figure.axes[0]), np.column_stack([scores[0]["measured"], scores[0]["predicted"]]))
    assert plot.extrapolation([]) is None


@pytest.mark.parametrize("form", ["sovit", "chinchilla", "joint"])
def test_other_forms_draw_what_they_can(form, data, tmp_path):
    fit = law.fit(form, data.columns, data.y)
    assert (plot.isoflop(fit, data) is None) == (form != "joint")
    assert (plot.optimal_shape(fit) is None) == (form == "chinchilla")
    plot.save(plot.residuals(fit, data), tmp_path / "r")


def test_runs_of_equal_images_are_drawn_by_images(data, tmp_path):
    from sovit.ledger.schema import new_row
    from sovit.spec.run import Recipe, Run

    runs = [
        Run(planted.CENTRE.replace(**{d: v}), Recipe(0.008), (8_000, 32_000, 128_000))
        for d, a in planted.ARMS.items()
        for v in a
    ]
    rows = [
        new_row(r, n, status="ok", num_classes=16, val_loss=float(planted.planted_loss(r.shape, n)))
        for r in runs
        for n in r.budgets
    ]
    data = measurements([planted.write_ledger(tmp_path / "a.jsonl", rows)])
    fit = law.fit("joint", data.columns, data.y)
    assert plot.budget_levels(fit, data)[0] == "num_examples"
    assert plot.isoflop(fit, data) is None
    figure = plot.fit_by_dimension(fit, data)
    assert "8×10³ images" in legend(figure)


def test_files_are_stable_and_not_empty(fit, data, tmp_path):
    digests = []
    for name in ("a", "b"):
        plot.save(plot.fit_by_dimension(fit, data), tmp_path / name)
        files = [(tmp_path / f"{name}.{end}").read_bytes() for end in ("png", "svg")]
        assert all(len(f) > 10_000 for f in files)
        digests.append([hashlib.sha256(f).hexdigest() for f in files])
    assert digests[0] == digests[1]
    text = (tmp_path / "a.svg").read_text()
    assert "<dc:date>" not in text and "matplotlib.org/" not in text.split("<defs>")[0].replace("http://www.w3.org", "")


def test_contact_sheet(tmp_path):
    images = np.random.default_rng(0).random((8, 16, 16, 3))
    plot.contact_sheet(images, [f"scene {i}" for i in range(8)], tmp_path / "sheet.png", title="stream:cpu, 16 px")
    assert (tmp_path / "sheet.png").stat().st_size > 5_000
    with pytest.raises(UserError, match="as many captions as images"):
        plot.contact_sheet(images, ["one"], tmp_path / "sheet.png")
    with pytest.raises(UserError, match="cannot write"):
        plot.contact_sheet(images, ["x"] * 8, tmp_path / "sheet.nothing")


@pytest.mark.filterwarnings("error")  # of a letter without a glyph
def test_captions_of_any_script_and_with_dollars_are_drawn(tmp_path):
    captions = ["\u732b", "\u0e1b\u0e23\u0e30", "$100_bill$ and $b", "a_{b}^c", "\u0441\u043e\u0431\u0430\u043a\u0430"]
    plot.contact_sheet(np.zeros((5, 4, 4, 3)), captions, tmp_path / "sheet.png", title="\u5199\u771f $x$")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    text, fonts = style.drawable("\u0441\u043e\u0431 $x")
    assert text == "\u0441\u043e\u0431 $x" and fonts == ["DejaVu Sans"]
    text, fonts = style.drawable("a\U0010fffd")  # a private letter that no font has
    assert text == "a\U0010fffd" and len(fonts) == 2 or text == "a\\U0010fffd"


@pytest.mark.parametrize(
    "ends", [(1.7e6, 4.5e7), (5e5, 1.5e7), (1e11, 6.5e11), (2.5e10, 6.9e11), (3e9, 4e9), (1e8, 1e20)]
)
@pytest.mark.parametrize(("panels", "most"), [(1, 4), (3, 3)])
def test_labels_of_flops_do_not_meet(ends, panels, most):
    figure, ((*axes,),) = style.grid(1, panels, 2.0, style.COLUMN if panels == 1 else style.PAGE)
    for axis in axes:
        axis.plot(ends, (1, 2))
        style.flops_axis(axis, ends, most)
    FigureCanvasAgg(figure).draw()
    for axis in axes:
        left, right = axis.get_xlim()
        labels = [t for x, t in zip(axis.get_xticks(), axis.get_xticklabels()) if left <= x <= right]
        assert 2 <= len(labels) <= most and all(label.get_text() for label in labels)
        places = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
        assert all(a.x1 < b.x0 for a, b in zip(places, places[1:]))


def test_validation_figure_joins_seeds(tmp_path):
    arms = {
        "recommended": dict(
            label="32x3x336", losses=[1.41, 1.40, 1.43], predicted=1.4, predicted_low=1.38, predicted_high=1.42
        ),
        "usual": dict(label="96x2x384", losses=[1.47, 1.45, 1.48], predicted=1.46),
    }
    figure = plot.validation(dict(arms=arms, train_flops=1e12, verdict="better"))
    (axis,) = figure.axes
    assert np.allclose(np.sort(points(axis)[:, 1]), np.sort(np.concatenate([a["losses"] for a in arms.values()])))
    assert axis.get_title("left").startswith("recommended: better (3 seeds an arm")
    plot.save(figure, tmp_path / "v.png")
    assert {p.name for p in tmp_path.iterdir()} == {"v.png", "v.svg"}
