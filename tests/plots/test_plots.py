"""Figures hold the data that they are made of, and are written whole or not at all."""

import pickle
import re
import subprocess
import sys

import matplotlib.figure
import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from matplotlib.colors import to_hex

import mijax as mj
from mijax import plots

pytestmark = pytest.mark.usefixtures("as_a_user")


def effects(values, **coords):
    return xr.DataArray(np.array(values, float), coords, ("layer", "head"))


SMALL = {"denoising": {"z": effects([[0.1, -0.4, np.nan], [0.8, 0.0, 0.2]])}}


def labels(axis, which):
    return [label.get_text() for label in getattr(axis, f"get_{which}ticklabels")()]


def test_heatmaps_hold_the_effects_on_one_symmetric_scale():
    words = xr.DataArray(np.full((1, 20), -0.5), {"pos": ["subject"] * 20}, ("layer", "pos"))
    figure = plots.heatmaps({**SMALL, "noising": {"z": words, "q": 2 * words}}, title="Patching", label="effect")
    assert isinstance(figure, matplotlib.figure.Figure) and figure.get_suptitle() == "Patching"
    first, nothing, one_row, last, colours = figure.axes
    (image,) = first.images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), SMALL["denoising"]["z"])
    assert image.get_array().mask.tolist() == [[False, False, True], [False] * 3]  # a NaN cell is blank
    assert all(axis.images[0].get_clim() == (-1.0, 1.0) for axis in (first, one_row, last)) and image.origin == "lower"
    assert (first.get_title(), first.get_xlabel(), first.get_ylabel()) == ("z", "head", "layer")
    assert labels(first, "x") == ["0", "1", "2"] and labels(first, "y") == ["0", "1"]
    assert one_row.images[0].get_array().shape == (1, 20) and labels(one_row, "x") == ["subject"] * 10
    assert one_row.get_xlabel() == "role" and last.get_ylabel() == "" and not nothing.axison
    assert colours.get_ylabel() == "effect"
    assert plots.heatmaps(SMALL, limit=3.0).axes[0].images[0].get_clim() == (-3.0, 3.0)
    blank = {"row": {"panel": effects([[np.nan, np.nan]])}}
    assert plots.heatmaps(blank).axes[0].images[0].get_clim() == (-1.0, 1.0)


def test_a_long_title_stays_within_a_narrow_figure():
    figure = plots.heatmaps(SMALL, title="patching indirect object identification " * 3)
    figure.draw_without_rendering()
    title, panel = figure.texts[0].get_window_extent(), figure.axes[0].title.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.x1 and panel.y1 <= title.y0 and title.y1 <= figure.bbox.y1


def test_a_page_shows_the_same_as_the_heat_maps():
    two = {**SMALL, "noising": {"z": effects([[-2.0]]), "q": effects([[0.5]], head=["7.1"])}}
    figure = plots.heatmap_page(two, title="Patching", label="effect")
    assert isinstance(figure, go.Figure) and figure.layout.title.text == "Patching"
    np.testing.assert_array_equal(figure.data[0].z, SMALL["denoising"]["z"])
    assert figure.data[2].x == ("7.1",) and "head %{x}" in figure.data[2].hovertemplate
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax, scale.colorbar.title.text) == (-2.0, 2.0, "effect")
    # each title stands over its panel, though the first row is shorter
    for trace, note in zip(figure.data, figure.layout.annotations, strict=True):
        across = figure.layout["xaxis" + trace.xaxis[1:]].domain
        up = figure.layout["yaxis" + trace.yaxis[1:]].domain
        assert np.isclose(note.x, np.mean(across)) and np.isclose(note.y, up[1])
    assert [note.text for note in figure.layout.annotations] == ["denoising: z", "noising: z", "noising: q"]
    cell = effects([[1.0]])  # many rows, and many columns, find room
    assert len(plots.heatmap_page({str(i): {"z": cell} for i in range(12)}).data) == 12
    assert len(plots.heatmap_page({"row": {str(i): cell for i in range(24)}}).data) == 24


def test_scatter_pairs_cells_whatever_the_order_of_dimensions():
    exact = effects([[0.1, -0.4, np.nan], [0.8, 0.0, 0.2]])
    figure = plots.scatter({"AtP": {"z": (exact, 2 * exact.T)}}, notes={("AtP", "z"): "slope 2"})
    axis = figure.axes[0]
    (dots,) = axis.collections
    points = dots.get_offsets().filled(np.nan)
    np.testing.assert_array_equal(points, np.stack([exact.values.ravel(), 2 * exact.values.ravel()], 1))
    assert dots.get_array().compressed().tolist() == [0, 0, 1, 1, 1] and axis.texts[0].get_text() == "slope 2"
    assert axis.get_xlim() == axis.get_ylim() and np.allclose(axis.get_xlim(), (-0.92, 1.72))


def test_scatter_pairs_cells_by_their_labels():
    exact = effects([[1.0, 2.0], [3.0, 4.0]], layer=[0, 5], head=["a", "b"])
    moved = (10 * exact).isel(layer=[1, 0], head=[1, 0])
    points = plots.scatter({"row": {"z": (exact, moved.T)}}).axes[0].collections[0].get_offsets()
    assert points.tolist() == [[1, 10], [2, 20], [3, 30], [4, 40]]
    unlabelled = xr.DataArray(10 * exact.values, dims=exact.dims)
    points = plots.scatter({"row": {"z": (exact, unlabelled)}}).axes[0].collections[0].get_offsets()
    assert points.tolist() == [[1, 10], [2, 20], [3, 30], [4, 40]]


def test_a_page_keeps_cells_of_equal_labels_apart():
    words = xr.DataArray(np.arange(6.0).reshape(2, 3), {"pos": ["Mary", "and", "Mary"]}, ("layer", "pos"))
    trace = plots.heatmap_page({"row": {"z": words}}).data[0]
    assert trace.x == ("0 Mary", "1 and", "2 Mary") and trace.y == ("0", "1")


def test_a_panel_of_other_axes_names_them():
    panel = SMALL["denoising"]["z"]
    row = {"row": {"a": panel, "b": panel.T, "c": panel.T}}
    assert [axis.get_ylabel() for axis in plots.heatmaps(row).axes[:3]] == ["layer", "head", ""]
    page = plots.heatmap_page(row).layout
    assert [page[axis].title.text for axis in ("yaxis", "yaxis2", "yaxis3")] == ["layer", "head", None]


def test_curves_hold_their_lines_and_labels():
    figure = plots.curves(
        {"loss": {"a": ([1, 10], [3, 2]), "b": ([1, 10], [4, 1])}, "one": {"a": ([1, 2], [0, 0])}},
        lines={"chance": 2.5}, xscale="log", xlabel="step",
    )  # fmt: skip
    first, second = figure.axes
    chance, a, b = first.lines
    assert chance.get_ydata() == [2.5, 2.5] and a.get_xydata().tolist() == [[1, 3], [10, 2]]
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["a", "b"] and second.get_legend() is None
    assert b.get_linestyle() == "-" and first.get_xscale() == "log" and second.get_xlabel() == "step"
    assert plots.curves({"": {"": ([1], [1])}}, dots=True).axes[0].lines[0].get_marker() == "."


def test_toy_models_directions_and_phases():
    w, b = np.array([[1.0, -0.5, 0.0], [0.0, 0.0, 2.0]]), np.array([0.1, 0.2, 0.3])
    figure = plots.models({str(i): (w, b) for i in range(3)}, columns=2)
    assert [axis.axison for axis in figure.axes[:4]] == [True, True, True, False]
    drawn = figure.axes[0].images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(drawn[:, :3], w.T @ w)
    assert np.isnan(drawn[:, 3]).all() and drawn[:, 4].tolist() == b.tolist()
    (bars,) = figure.axes[0].child_axes
    assert [bar.get_width() for bar in bars.patches] == [1.0, 0.5, 2.0]

    lines = plots.directions({"plane": w}, groups=[0, 0, 1]).axes[0].lines
    assert [line.get_xydata()[1].tolist() for line in lines] == w.T.tolist()
    assert [line.get_color() for line in lines] == ["C0", "C0", "C1"]

    along = {"importance": np.array([0.1, 1.0]), "density": np.array([1.0, 0.1, 0.01])}
    axis = plots.phases({"n=2": {"theory": (along, np.array([[-1, 0, 1], [2, 2, 2]]))}}, title="Roles").axes[0]
    mesh = axis.collections[0]
    colours = [to_hex(colour) for colour in mesh.to_rgba(mesh.get_array()).reshape(-1, 4)]
    assert colours == ["#000000", "#ededed", "#d62728", "#1f77b4", "#1f77b4", "#1f77b4"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("density", "n=2\nimportance") and axis.xaxis_inverted()


EXACT = SMALL["denoising"]["z"]
FAULTS = {
    "no panels": (lambda: plots.heatmaps({}), "no panels to draw"),
    "no panels of a page": (lambda: plots.heatmap_page({"row": {}}), "no panels to draw"),
    "no models": (lambda: plots.models({}), "no panels to draw"),
    "no curves": (lambda: plots.curves({}), "no panels to draw"),
    "no columns": (lambda: plots.directions({"a": np.eye(2)}, columns=0), "columns=0: expected at least 1"),
    "one dimension": (lambda: plots.heatmaps({"a": {"b": EXACT[0]}}), r"panel 'b' of row 'a' has .*'head': 3.*; expected two"),
    "no cells": (lambda: plots.heatmap_page({"a": {"b": EXACT[:0]}}), "'layer': 0.*not empty"),
    "limit": (lambda: plots.heatmaps(SMALL, limit=-1.0), "limit=-1.0: expected a positive"),
    "infinite limit": (lambda: plots.heatmaps(SMALL, limit=np.inf), "limit=inf: expected a positive"),
    "no limit": (lambda: plots.heatmap_page(SMALL, limit=np.nan), "limit=nan: expected a positive"),
    "other labels": (lambda: plots.scatter({"a": {"b": (EXACT.assign_coords(layer=[0, 1]), EXACT.assign_coords(layer=[1, 2]))}}), r"panel 'b' of row 'a': along 'layer'.*\[0, 1\].*\[1, 2\]"),
    "repeated labels": (lambda: plots.scatter({"a": {"b": (EXACT.assign_coords(layer=[0, 0]), EXACT.assign_coords(layer=[0, 1]))}}), "each once, are expected"),
    "other cells": (lambda: plots.scatter({"a": {"b": tuple(EXACT[0].drop_vars("layer", errors="ignore").assign_coords(layer=("head", [0, 1, i])) for i in (2, 3))}}), "different labels 'layer'"),
    "other shape": (lambda: plots.scatter({"a": {"b": (EXACT, EXACT[:1])}}), "panel 'b' of row 'a': exact.*'layer': 2.*'layer': 1"),
    "no layer": (lambda: plots.scatter({"a": {"b": (EXACT.rename(layer="pos"),) * 2}}), "no layers.*'pos': 2"),
    "not a plane": (lambda: plots.directions({"a": np.eye(3)}), r"panel 'a' has W of shape \(3, 3\); expected \[2, feature\]"),
    "a bias for each unit": (lambda: plots.models({"a": (np.eye(2, 3), np.zeros(2))}), r"W of shape \(2, 3\) and b of \(2,\)"),
    "few groups": (lambda: plots.directions({"a": np.eye(2)}, groups=[0]), "2 features, and groups=.* colours 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_drawn_is_an_error(name):
    call, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        call()


OTHER_FORMS = {
    "one result": (lambda: plots.heatmaps(EXACT), "given DataArray"),
    "a page of one row": (lambda: plots.heatmap_page({"z": EXACT}), "given DataArray"),
    "arrays": (lambda: plots.heatmaps({"a": {"b": EXACT.values}}), "'b' is a ndarray"),
    "trained models": (lambda: plots.models(xr.Dataset({"W": ("a", [0.0])})), "'W' is a DataArray"),
    "a model without bias": (lambda: plots.models({"a": np.eye(2)}), "'a' is a ndarray"),
    "roles alone": (lambda: plots.phases({"a": {"b": np.eye(2)}}), r"roles \[y, x\].*'b' is a ndarray"),
    "numbers as roles": (lambda: plots.phases({"a": 3.0}), "given float"),
    "values alone": (lambda: plots.curves({"a": [1, 2]}), "given list"),
    "words": (lambda: plots.directions({"a": "b"}), "'a' is a str"),
    "estimates alone": (lambda: plots.scatter({"a": {"b": EXACT}}), "'b' is a DataArray"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_panels_of_another_form(name):
    call, message = OTHER_FORMS[name]
    with pytest.raises(TypeError, match=rf"(?s)panels are given as \{{.*{message}"):
        call()


def test_a_limit_that_is_no_number():
    for limit in ("x", True):
        with pytest.raises(TypeError, match="limit must be a number"):
            plots.heatmaps(SMALL, limit=limit)


def test_save_refuses_before_it_writes(tmp_path):
    image, page = plots.heatmaps(SMALL), plots.heatmap_page(SMALL)
    good = tmp_path / "new" / "good"
    for figure, suffix, message in (
        (image, ".html", "cannot write a matplotlib figure to .*html.*or .png"),
        (image, "", "cannot write a matplotlib figure"),
        (page, ".png", "cannot write a plotly figure to .*png.*ends in .html"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.save(figure, good.with_suffix(".html" if figure is page else ".png"), tmp_path / f"bad{suffix}")
    with pytest.raises(TypeError, match="given DataArray"):
        plots.save(EXACT, good)
    image.suptitle("$\\nonsense$")  # which matplotlib finds out when it draws
    with pytest.raises(ValueError, match="nonsense"):
        plots.save(image, tmp_path / "bad.png")
    assert list(tmp_path.iterdir()) == []


def test_save_writes_images_and_pages_that_need_no_network(tmp_path):
    image = plots.curves({"loss": {"": ([1, 2], [2, 1])}})
    plots.save(image, tmp_path / "new" / "a.png", str(tmp_path / "new" / "b.SVG"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "b.SVG"]
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert image._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    assert len(pickle.loads(pickle.dumps(image)).axes) == 1
    plots.save(plots.heatmap_page(SMALL), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "denoising: z" in page and "Plotly.newPlot" in page and len(page) > 1e6
    assert not re.search(r"<script[^>]*\ssrc=|<link", page)


def test_no_pyplot_and_nothing_imported_before_a_figure_is_made(tmp_path):
    script = """
import sys
import mijax as mj
loaded = lambda: sorted({"matplotlib", "plotly", "matplotlib.pyplot"} & set(sys.modules))
print(loaded())
figure = mj.plots.curves({"": {"": ([1, 2], [1, 2])}})
mj.plots.save(figure, sys.argv[1])
print(loaded())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.svg")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", "['matplotlib']"]


def test_the_face():
    assert mj.plots is plots
    names = {"curves", "directions", "heatmap_page", "heatmaps", "models", "phases", "save", "scatter"}
    assert set(plots.__all__) == names | {"Panels"}
