"""Names and labels of a result that would hide one another."""

import pytest

import mijax as mj
from tests.situations import refused
from tests.situations.prompts import IDS, METRIC, OTHERS, small_model

LAYERS = mj.grid(layer=range(2))


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        *(("sweep", name) for name in ("layer", "batch", "base", "token", "has_position", "base.other")),
        ("patch", "source"),
        ("ablate", "layer"),
    ],
)
def test_a_metric_named_like_a_coordinate(driver, name, x64):
    metrics, model = {name: METRIC, "other": METRIC}, small_model()
    calls = {
        "sweep": lambda: mj.sweep(model, IDS, {"z": mj.Scale(0.0, LAYERS)}, metrics),
        "patch": lambda: mj.patch(model, clean=OTHERS, corrupted=IDS, site="z", over=("layer",), metric=metrics),
        "ablate": lambda: mj.ablate(model, IDS, site="z", over=("layer",), metric=metrics, kind="mean"),
    }
    with refused(ValueError, f"metric {name!r} has the name of a dimension or coordinate"):
        calls[driver]()


@pytest.mark.parametrize("dim", ["base", "source", "batch", "token", "has_position"])
def test_a_stack_along_a_name_that_results_have(dim):
    with refused(ValueError, f"a dimension cannot be named {dim!r}"):
        mj.stack(dim, {x: {"z": mj.Scale(x, mj.Where(layer=1))} for x in (0.0, 1.0)})


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([(0, 1), (1, 2)], TypeError, r"strings or numbers, given \(0, 1\)"),
        ([1, "1"], ValueError, "1 and '1'.*both '1'"),
    ],
)
def test_a_stack_of_labels_that_the_result_cannot_tell_apart(labels, error, message):
    with refused(error, message):
        mj.stack("pair", {label: {"z": mj.Scale(0.0, mj.Where(layer=1))} for label in labels})


def test_roles_that_are_equal_as_text():
    with refused(ValueError, "axis 'layer' of the grid has several choices named '1'"):
        mj.grid(layer={1: 0, "1": 2})


def test_a_stack_of_functions_says_that_they_cannot_be_stacked():
    edits = {"a": {"z": lambda x, *_: 0 * x}, "b": {"z": lambda x, *_: x + 1}}
    with refused(TypeError, "v='b' and v='a' have different functions, which cannot be stacked"):
        mj.stack("v", edits)
