"""Every edit, at every kind of place, against a loop over the NumPy reference (float64, 1e-10).

Indices and values are drawn by hypothesis; structures are few, so that little is compiled.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mijax as mj
from tests.architectures import ARCHITECTURES, LENGTHS, batch, error, example, on_real, random_model, real
from tests.reference.forward import forward
from tests.reference.selecting import selected

pytestmark = pytest.mark.usefixtures("x64")
SHORTEST = int(LENGTHS.min())  # positions that every prompt has


def basis_projector(basis, x):
    """The projection onto the span of the rows, by least squares."""
    coefficients = np.linalg.lstsq(basis.T, x.reshape(-1, x.shape[-1]).T, rcond=None)[0]
    return (basis.T @ coefficients).T.reshape(x.shape)


# name: (our edit from a value, a basis and a where; the new activation in NumPy)
EDITS = {
    "replace": (lambda v, b, w: mj.Replace(v, w), lambda x, v, b: v),
    "scale": (lambda v, b, w: mj.Scale(v, w), lambda x, v, b: x * v),
    "add": (lambda v, b, w: mj.Add(v, w), lambda x, v, b: x + v),
    "project": (lambda v, b, w: mj.Project(b, w), lambda x, v, b: x - basis_projector(b, x)),
    "interchange": (lambda v, b, w: mj.Interchange(v, b, w), lambda x, v, b: x + basis_projector(b, v - x)),
    "mix": (lambda v, b, w: mj.Mix(0.3, v, w), lambda x, v, b: 0.7 * x + 0.3 * v),
}
VECTORS = ("resid_pre", "z", "k", "post", "result", "q_input", "v_input", "ln2.normalized", "embed")
OTHERS = ("pattern", "attn_scores", "ln1.scale")


def index(n):
    return st.integers(-n, n - 1)


def places(site, config):
    """Structures of `Where` that suit a site; each draws its indices."""
    sizes = {"layer": config.n_layers, "batch": 3, "pos": SHORTEST, "query": SHORTEST, "key": SHORTEST, "unit": config.d_head,
             "head": config.n_kv_heads if "kv_head" in mj.SITES[site].axes else config.n_heads}  # fmt: skip
    from mijax.model.sites import SELECTS

    fields = [SELECTS[axis] for axis in mj.SITES[site].axes]
    single = st.fixed_dictionaries({f: index(sizes[f]) for f in fields if f != "unit"})
    zipped = st.fixed_dictionaries(
        {f: st.lists(index(sizes[f]), min_size=3, max_size=3) for f in fields if f not in ("batch", "unit")}
    )
    positions = [f for f in fields if f in ("pos", "query", "key")]
    per_example = st.fixed_dictionaries({
        positions[0]: st.lists(st.lists(index(SHORTEST), min_size=2, max_size=2), min_size=3, max_size=3),
        **({"head": st.lists(index(sizes["head"]), min_size=2, max_size=2)} if "head" in fields else {}),
    })  # fmt: skip
    last = st.fixed_dictionaries(
        {"unit" if "unit" in fields else fields[-1]: st.lists(index(4), min_size=2, max_size=2)}
    )
    return {
        "one": single,
        "zipped": zipped,
        "per example": per_example,
        "some of the last axis": last,
        "all": st.just({}),
    }


# Every site with one edit, every edit at one site of each kind (they know nothing of each other but shapes).
EACH_KIND = ("resid_pre", "z", "result", "q_input", "pattern")
PAIRS = [("replace", s) for s in VECTORS + OTHERS] + [(e, s) for e in EDITS for s in EACH_KIND if e != "replace"]


@pytest.mark.parametrize(
    "name, site", [(e, s) for e, s in PAIRS if s in VECTORS or e not in ("project", "interchange")]
)
def test_an_edit_does_what_the_loop_does(name, site):
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")
    shape = mj.sites(model, tokens)[site].shape
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(2, shape[-1]))
    ours, theirs = EDITS[name]
    run = eqx.filter_jit(
        lambda value, where: mj.run(model, tokens, {site: ours(value, jnp.asarray(basis), where)}).logits
    )

    @settings(max_examples=3)
    @given(st.data())
    def check(data):
        for structure, drawn in places(site, model.config).items():
            where = data.draw(drawn, label=structure)
            value = data.draw(st.sampled_from([1.0, -0.5])) * rng.normal(size=shape)
            value = np.abs(value) + 0.5 if site == "ln1.scale" else value
            logits = run(jnp.asarray(value), mj.Where(**where))
            for i in range(3):
                operand = example(value, site, tokens, i)

                def hook(at, layer, x, i=i, operand=operand, where=where):
                    if at != site:
                        return x
                    new = theirs(x, operand if layer is None else operand[layer], basis)
                    return np.where(selected(where, site, layer, i, x.shape, model.config.n_layers), new, x)

                expected = forward(model, np.asarray(tokens.ids)[i, real(tokens, i)], hook)
                assert error(logits[i, real(tokens, i)], expected) < 1e-10, (structure, where)

    check()


@pytest.mark.parametrize("site, mask", [
    ("z", {"head": [True, False, True, False], "layer": [False, True, True]}),
    ("resid_pre", {"unit": [True] * 5 + [False] * 7, "batch": [True, False, True]}),
    ("result", {"head": [False, True, True, False]}),
])  # fmt: skip
def test_boolean_masks(site, mask):
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("right")
    logits = mj.run(model, tokens, {site: mj.Replace(0.7, mj.Where(**mask))}).logits
    listed = {f: np.flatnonzero(m) for f, m in mask.items()}
    grid = np.meshgrid(*listed.values(), indexing="ij")
    indices = {f: g.ravel() for f, g in zip(listed, grid)}
    expected = mj.run(model, tokens, {site: mj.Replace(0.7, mj.Where(**indices))}).logits
    assert error(on_real(logits, tokens), on_real(expected, tokens)) < 1e-10


def test_a_mask_over_positions_is_over_columns():
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")
    columns = np.zeros((3, 6), bool)
    columns[[0, 1, 2], [5, 4, 2]] = True
    by_mask = mj.run(model, tokens, {"mlp_out": mj.Scale(0.0, mj.Where(pos=columns))}).logits
    by_index = mj.run(model, tokens, {"mlp_out": mj.Scale(0.0, mj.Where(pos=[[5], [2], [1]]))}).logits
    assert error(on_real(by_mask, tokens), on_real(by_index, tokens)) < 1e-10


def test_several_edits_act_in_order():
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("none")
    for site in ("z", "result", "k_input"):
        where = mj.Where(head=[1, -1], layer=1)
        edits = [mj.Add(1.0, where), mj.Scale(2.0, mj.Where(head=1)), mj.Replace(3.0, mj.Where(head=0, pos=0))]
        logits = mj.run(model, tokens, {site: edits}).logits

        def hook(at, layer, x, site=site):
            if at == site:
                last = x.shape[1] - 1
                x = x.copy()
                for head in {1, last} if layer == 1 else ():
                    x[:, head] += 1
                x[:, 1] *= 2
                x[0, 0] = 3
            return x

        for i in range(3):
            assert error(logits[i], forward(model, np.asarray(tokens.ids)[i], hook)) < 1e-10
        swapped = mj.run(model, tokens, {site: edits[1::-1] + edits[2:]}).logits
        assert error(swapped, logits) > 1e-6


@pytest.mark.parametrize("site", ["result", "q_input", "k_input", "v_input"])
def test_per_head_copies_compute_the_selected_heads_only(site):
    """One head of four: no array of the program holds all heads' d_model numbers. All heads: one does."""
    import jax

    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("none")

    def shapes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.shape for v in eqn.outvars)
            for p in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                if hasattr(p, "eqns") or hasattr(p, "jaxpr"):
                    yield from shapes(getattr(p, "jaxpr", p))

    whole = (3, 6, 4, 12)
    program = lambda where: (
        jax.make_jaxpr(lambda: mj.run(model, tokens, {site: mj.Scale(0.5, where)}).readout.final)().jaxpr
    )
    assert whole not in set(shapes(program(mj.Where(head=2))))
    assert whole in set(shapes(program(mj.Where(layer=1))))


def test_a_callable_sees_site_layer_and_positions():
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")

    class Ramp(eqx.Module):
        slope: jnp.ndarray

        def __call__(self, x, site, layer, positions):
            assert site == "attn_out"
            return x + self.slope * layer.astype(x.dtype) * jnp.maximum(positions, 0).astype(x.dtype)[:, :, None]

    logits = mj.run(model, tokens, {"attn_out": Ramp(jnp.asarray(0.3))}).logits
    hook = lambda at, layer, x: x + 0.3 * layer * np.arange(len(x))[:, None] if at == "attn_out" else x
    for i in range(3):
        columns = real(tokens, i)
        assert error(logits[i, columns], forward(model, np.asarray(tokens.ids)[i, columns], hook)) < 1e-10
    outside = mj.run(model, tokens, {"embed": lambda x, site, layer, positions: 2 * x if layer is None else x}).logits
    scaled = mj.run(model, tokens, {"embed": mj.Scale(2.0)}).logits
    assert error(on_real(outside, tokens), on_real(scaled, tokens)) < 1e-10


def test_values_of_lower_rank_broadcast_and_a_layer_axis_of_one_serves_all_layers():
    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("none")
    vector = np.random.default_rng(0).normal(size=12)
    add = lambda v: mj.run(model, tokens, {"resid_mid": mj.Add(v, mj.Where(layer=1))}).logits
    full = np.broadcast_to(vector, (3, 3, 6, 12))
    for v in (vector, vector[None], vector[None, None, None]):
        assert error(add(v), add(full)) < 1e-10


def test_project_needs_no_orthonormal_basis_and_layers_may_have_their_own():
    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("none")
    bases = np.random.default_rng(0).normal(size=(3, 2, 12))
    project = lambda basis, **where: mj.run(
        model, tokens, {"mlp_out": mj.Project(basis, mj.Where(**where))}, capture=("mlp_out",)
    )
    out = project(bases)
    left = np.einsum("lbpd,lkd->lbpk", np.asarray(out.acts["mlp_out"]), bases)
    assert np.abs(left).max() < 1e-10 * np.abs(bases).max() * float(jnp.max(jnp.abs(out.acts["mlp_out"])))
    mixed = project(np.array([[1.0, 2.0], [0.0, 3.0]]) @ bases[1], layer=1)  # another basis of the same span
    assert error(mixed.logits, project(bases[1], layer=1).logits) < 1e-10


@pytest.mark.parametrize("where, kept", [
    ({"layer": 1}, (1, 3, 6, 4, 6)),
    ({"layer": [2, -3, 2]}, (3, 3, 6, 4, 6)),
    ({"layer": [2, 0], "pos": -1}, (2, 3, 1, 4, 6)),
    ({"pos": [[0, -1], [1, 2], [-2, 0]], "head": [3, 1, 1]}, (3, 3, 2, 3, 6)),
    ({"batch": [2, 0], "unit": -1}, (3, 2, 6, 4, 1)),
    ({"batch": [2, 0], "pos": [[0, -1], [1, 2], [-2, 0]]}, (3, 2, 2, 4, 6)),
])  # fmt: skip
def test_narrowed_captures_are_the_entries_of_the_whole(where, kept):
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")
    whole = np.asarray(mj.run(model, tokens, capture=("z",)).acts["z"])
    part = mj.run(model, tokens, capture={"z": mj.Where(**where)}).acts["z"]
    assert part.shape == kept
    expected = whole
    axes = ("layer", "batch", "pos", "head", "unit")
    for name in (n for n in ("layer", "pos", "head", "unit", "batch") if n in where):
        axis, index = axes.index(name), np.asarray(where[name])
        if name == "pos":
            index = np.broadcast_to(
                index.reshape(-1, index.shape[-1] if index.ndim else 1), (3, index.shape[-1] if index.ndim else 1)
            )
            rows = [expected[:, i][:, real(tokens, i)[index[i]]] for i in range(3)]
            expected = np.stack(rows, axis=1)
        else:
            expected = np.take(expected, index.reshape(-1), axis=axis)
    assert error(part, expected) < 1e-10


def test_narrowed_captures_take_the_memory_that_they_keep():
    """All layers of `z` take n_layers times what one layer takes; the compiled program shows it."""
    import jax

    model = mj.init(mj.Config(n_layers=32, d_model=16, n_heads=2, d_vocab=11, n_ctx=64), jax.random.key(0), jnp.float32)
    ids = jnp.zeros((4, 64), jnp.int32)
    run = lambda capture: (
        jax.jit(lambda m, i: mj.run(m, i, capture=capture).acts["z"]).lower(model, ids).compile().memory_analysis()
    )
    size = lambda capture: run(capture).output_size_in_bytes + run(capture).temp_size_in_bytes
    layer_bytes = 4 * 64 * 16 * 4  # bytes of one layer
    assert size(("z",)) - size({"z": mj.Where(layer=[3])}) > 30 * layer_bytes


@pytest.mark.parametrize("site", ["q", "v", "z", "result", "k_input"])
@pytest.mark.parametrize("axes", [("layer",), ("head",), ("layer", "head")])
def test_a_basis_per_head_is_each_heads_own_projection(x64, site, axes):
    """In `run`, at some heads only, in a sweep whose cells share it, and while generating: NumPy's least squares, head by head."""
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")
    clean = mj.run(model, tokens, capture=(site,)).acts[site]
    layers, heads, unit = clean.shape[0], *clean.shape[-2:]
    n = {"layer": layers, "head": heads}
    basis = np.random.default_rng(0).normal(size=(*(n[axis] for axis in axes), 2, unit))
    full = np.broadcast_to(basis.reshape(*(n[a] if a in axes else 1 for a in n), 2, unit), (layers, heads, 2, unit))
    project = lambda where=mj.Where(): {site: mj.Project(jnp.asarray(basis), where)}
    out = mj.run(model, tokens, project(mj.Where(layer=0)), capture=(site,)).acts[site][0]
    for head in range(heads):
        x = np.asarray(clean)[0, :, :, head]
        assert error(out[:, :, head], x - basis_projector(full[0, head], x)) < 1e-10
    some = mj.run(model, tokens, project(mj.Where(layer=0, head=[1])), capture=(site,)).acts[site][0]
    assert error(some[:, :, 1], out[:, :, 1]) < 1e-10 and error(some[:, :, 0], clean[0, :, :, 0]) < 1e-10

    metric, cells = mj.metrics.logit_diff(3, 4), mj.grid(layer=range(3), head=range(heads))
    swept = mj.sweep(model, tokens, {site: mj.Project(jnp.asarray(basis), cells)}, metric)
    for layer, head in np.ndindex(layers, heads):
        alone = mj.run(model, tokens, project(mj.Where(layer=layer, head=head)))
        assert error(swept[layer, head], metric(alone)) < 1e-10

    prompts = mj.Tokens(np.asarray(tokens.ids)[:, -2:])
    done = mj.generate(model, prompts, project(), max_new_tokens=3, capture=(site,))
    again = mj.run(model, mj.Tokens(done.ids), project(), capture=(site,))
    assert error(done.acts[site][:, :, :-1], again.acts[site][:, :, :-1]) < 1e-10


def test_a_basis_in_training_stays_a_projection():
    """Its gradient is that of the subspace: moving a row along another changes nothing."""
    import jax

    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("none")
    source = mj.run(model, batch("none", (np.asarray(tokens.ids) + 5) % 19), capture=("resid_mid",)).acts["resid_mid"]
    built = mj.Interchange(source, np.random.default_rng(0).normal(size=(2, 12)), mj.Where(layer=1))
    loss = lambda edit: jnp.sum(mj.run(model, tokens, {"resid_mid": edit}).readout.logits(pos=-1)[:, 3])
    gradient = jax.grad(lambda b: loss(eqx.tree_at(lambda e: e.basis, built, b)))(jnp.asarray(built.basis))
    assert np.abs(np.asarray(gradient) @ np.asarray(built.basis).T).max() < 1e-10 * np.abs(np.asarray(gradient)).max()
    assert np.abs(np.asarray(gradient)).max() > 1e-6
    moved = jnp.asarray(built.basis) - 0.3 * gradient
    updated = loss(eqx.tree_at(lambda e: e.basis, built, moved))
    assert error(updated, loss(mj.Interchange(source, moved, mj.Where(layer=1)))) < 1e-10


def test_scores_of_minus_infinity_cut_keys_and_a_query_without_any_gathers_nothing():
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")
    cut = lambda **where: mj.run(
        model, tokens, {"attn_scores": mj.Replace(-np.inf, mj.Where(**where))}, capture=("pattern", "z")
    )
    for query in (0, -1):
        row = mj.Where(query=query)
        kept = mj.run(
            model, tokens, {"attn_scores": mj.Replace(-np.inf, row)}, capture={"pattern": row, "z": mj.Where(pos=query)}
        )
        assert (kept.acts["pattern"] == 0).all() and (kept.acts["z"] == 0).all()
    out = cut(layer=1, query=-1, key=0)
    before = mj.run(model, tokens, capture={"pattern": mj.Where(layer=1, query=-1)}).acts["pattern"][0, 0, :, 0]
    after = out.acts["pattern"][1, 0, :, 5]
    assert (after[:, 0] == 0).all() and error(after[:, 1:], before[:, 1:] / (1 - before[:, :1])) < 1e-10
