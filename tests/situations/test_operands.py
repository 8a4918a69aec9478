"""An operand with fewer axes than its site is read in one way, or the user says in which."""

import jax
import numpy as np
import pytest

import mijax as mj
from tests.situations import refused
from tests.situations.models import logits, model

VECTORS = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)  # as many as there are layers
THREE, FOUR = [[1, 2, 3]], [[1, 2, 3, 4]]
BATCH = [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]
by_layer = lambda ids: logits(model(), ids, {"resid_post": mj.Add(VECTORS[:, None, None])})


@pytest.mark.parametrize("edit", [mj.Add, mj.Replace, mj.Scale, lambda v, **a: mj.Mix(0.5, v, **a)])
@pytest.mark.parametrize("ids", [THREE, BATCH, BATCH[:1]])
def test_a_vector_for_each_layer(edit, ids):
    said = logits(model(), ids, {"resid_post": edit(VECTORS, axes=("layer", "unit"))})
    assert np.allclose(said, logits(model(), ids, {"resid_post": edit(VECTORS[:, None, None])}))
    with refused(ValueError, r"shape \(3, 8\).*axes=\('layer', 'unit'\)"):
        mj.run(model(), ids, {"resid_post": edit(VECTORS)})


def test_a_vector_for_each_token():
    said = logits(model(), THREE, {"resid_post": mj.Add(VECTORS, axes=("pos", "unit"))})
    assert np.allclose(said, logits(model(), THREE, {"resid_post": mj.Add(VECTORS[None, None])}))
    assert np.allclose(logits(model(), FOUR, {"resid_post": mj.Add(np.eye(4, 8, dtype=np.float32))}),
                       logits(model(), FOUR, {"resid_post": mj.Add(np.eye(4, 8, dtype=np.float32)[None, None])}))  # fmt: skip


def test_axes_in_any_order_and_by_either_name():
    expected = by_layer(THREE)
    for value, axes in ((VECTORS.T, ("unit", "layer")), (VECTORS, ("layer", "d_model"))):
        assert np.allclose(logits(model(), THREE, {"resid_post": mj.Add(value, axes=axes)}), expected)


@pytest.mark.parametrize("how", [jax.jit, lambda f: lambda v: jax.vmap(f)(v[None])[0]])
def test_a_vector_for_each_layer_inside_a_transformation(how):
    run = lambda v, **axes: mj.run(model(), THREE, {"resid_post": mj.Add(v, **axes)}).logits
    assert np.allclose(
        how(lambda v: run(v, axes=("layer", "unit")))(VECTORS), by_layer(THREE), atol=1e-6
    )  # another program rounds otherwise
    with refused(ValueError, "in 2 ways"):
        how(run)(VECTORS)


def test_a_number_for_each_head_where_there_are_as_many_tokens():
    ids, factors = [[1, 2]], np.array([0.0, 1.0], np.float32)
    with refused(ValueError, r"axes=\('head',\) or axes=\('query',\) or axes=\('key',\)"):
        mj.run(model(), ids, {"pattern": mj.Scale(factors)})
    said = logits(model(), ids, {"pattern": mj.Scale(factors, axes=("head",))})
    assert np.allclose(said, logits(model(), ids, {"pattern": mj.Scale(0.0, mj.Where(head=0))}))


def test_captured_activations_of_one_layer_fit_as_they_are():
    ids = BATCH[:2]
    acts = mj.run(model(), [row[::-1] for row in ids], capture=("resid_mid",)).acts["resid_mid"]
    given = logits(model(), ids, {"resid_mid": mj.Replace(acts[1], mj.Where(layer=1))})
    assert np.allclose(given, logits(model(), ids, {"resid_mid": mj.Replace(acts, mj.Where(layer=1))}))


def test_a_vector_for_each_layer_in_a_sweep_and_a_stack():
    grid, metric = mj.grid(layer=range(3)), mj.metrics.logit(3)
    said = mj.sweep(
        model(), THREE, {"resid_post": mj.Add(VECTORS, grid, axes=("layer", "unit"))}, metric, progress=False
    )
    full = mj.sweep(model(), THREE, {"resid_post": mj.Add(VECTORS[:, None, None], grid)}, metric, progress=False)
    doses = lambda **axes: mj.stack(
        "dose", {d: {"resid_post": mj.Add(np.float32(d) * VECTORS, **axes)} for d in (1.0, 2.0)}
    )
    stacked = mj.sweep(model(), THREE, doses(axes=("layer", "unit")), metric, progress=False)
    assert np.allclose(said, full) and np.allclose(stacked[0], by_layer(THREE)[0, -1, 3], atol=1e-5)
    with refused(ValueError, "in 2 ways"):
        mj.sweep(model(), THREE, doses(), metric, progress=False)


@pytest.mark.parametrize("axes, message", [
    (("layer", "head"), "must be different axes of site 'resid_post'"), (("unit", "unit"), "must be different axes"),
    (("layer", "pos", "unit"), r"are 3, the vector at site 'resid_post' has shape \(3, 8\)"),
])  # fmt: skip
def test_axes_that_do_not_fit(axes, message):
    with refused(ValueError, message):
        mj.run(model(), THREE, {"resid_post": mj.Add(VECTORS, axes=axes)})


def test_a_basis_that_could_be_one_per_layer_or_one_per_head():
    """Two layers of two heads."""
    square = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    bases = np.random.default_rng(0).normal(size=(2, 1, 4)).astype(np.float32)
    with refused(
        ValueError,
        r"Project's basis has shape \(2, 1, 4\), which could be one per layer or one per head .*\[2, 1, ...\] or \[1, 2, ...\]",
    ):
        mj.run(square, THREE, {"z": mj.Project(bases)})
    clean = np.asarray(mj.run(square, THREE, capture=("z",)).acts["z"][0])
    for full, per_head in (
        (bases[:, None], bases[[0, 0]]),
        (bases[None], bases),
    ):  # the first layer's basis for both heads; each head's
        z = np.asarray(mj.run(square, THREE, {"z": mj.Project(full)}, capture=("z",)).acts["z"][0])
        for head in range(2):
            x, b = clean[:, :, head], per_head[head, 0]
            assert np.allclose(z[:, :, head], x - (x @ b)[..., None] * b / (b @ b), atol=1e-6)
    with refused(
        ValueError,
        r"basis has shape \(3, 1, 4\), expected \[k, 4\], \[k, unit\] or \[layer, k, unit\] or \[head, k, unit\]",
    ):
        mj.run(square, THREE, {"z": mj.Project(np.ones((3, 1, 4), np.float32))})
    assert mj.run(square, THREE, {"resid_pre": mj.Project(np.ones((2, 1, 8), np.float32))}).logits.shape == (1, 3, 11)


@pytest.mark.parametrize(
    "site, where",
    [
        ("resid_post", {"layer": [1, 0, 2]}),
        ("z", {"head": [1, 0]}),
        ("z", {"pos": [-1, 0, 1]}),
        ("resid_post", {"layer": [0, 0, 1]}),
    ],
)
def test_activations_captured_in_the_order_of_a_list(site, where):
    """A capture follows the list and an operand the axis: they may not be taken for one another."""
    acts = mj.run(model(), THREE, capture={site: mj.Where(**where)}).acts[site]
    with refused(ValueError, "in another order"):
        mj.run(model(), THREE, {site: mj.Replace(acts, mj.Where(**where))})


@pytest.mark.parametrize(
    "where", [{"layer": [0, 1, 2]}, {"layer": 1}, {"pos": [0, 1, 2]}, {"pos": [[0, 1, 2]]}, {"layer": [2, 0, 1]}]
)
def test_activations_captured_at_a_place_go_back_there(where):
    acts = mj.run(model(), THREE, capture={"resid_post": mj.Where(**where)}).acts["resid_post"]
    acts = acts[jax.numpy.argsort(jax.numpy.asarray(where["layer"]))] if where == {"layer": [2, 0, 1]} else acts
    back = {"resid_post": mj.Replace(acts, mj.Where(**(where if where != {"layer": [2, 0, 1]} else {})))}
    assert np.array_equal(logits(model(), THREE, back), logits(model(), THREE))


@pytest.mark.parametrize("door", [mj.Add, mj.Replace, mj.Scale, lambda b: mj.Project(b)])
def test_an_array_that_is_filled_anew(door):
    """The usual loop over directions with one buffer."""
    buffer, edits = np.zeros(8, np.float32), []
    for i in range(3):
        buffer[:] = 0.1
        buffer[i] = 5
        edits.append({"resid_post": door(buffer)})
    assert len({logits(model(), THREE, edit).tobytes() for edit in edits}) == 3


def test_prompts_indices_and_answers_that_are_filled_anew():
    ids, index, answer = (np.array(x, np.int32) for x in (THREE, [0, 1], [4]))
    tokens, where, metric = mj.Tokens(ids), mj.Where(layer=index), mj.metrics.logit(answer)
    reference = np.zeros((1, 11), np.float32)
    kl = mj.metrics.kl(reference)
    for array in (ids, index, answer, reference):
        array[:] = 2
    assert tokens.ids.tolist() == THREE and where.layer.tolist() == [0, 1] and metric.answer.tolist() == [4]
    assert not np.asarray(kl.reference).any()
