"""The sweep engine against a Python loop of single runs (law 5): float64, on every site and every way to fall back."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mijax as mj
from mijax.engine.cells import canonical_cells, cells_of
from mijax.engine.layout import cell_bytes, job_of, layout_bytes, layout_of, row_bytes, unit_bytes
from mijax.engine.measure import as_programs
from mijax.engine.plan import Shape, Work, capacity, chunk_of, columns_read, plan, tokens_of_cell, work
from mijax.model.sites import SELECTS
from tests.architectures import ARCHITECTURES, IDS, LENGTHS, batch, error, random_model
from tests.compilations import compilations

METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])
SHORTEST = int(LENGTHS.min())
TOLERANCE = 1e-10
EACH_KIND = ("resid_pre", "z", "pattern", "result", "k_input", "ln1.scale", "post")
CASES = [
    (name, site)
    for name, config in ARCHITECTURES.items()
    for site in mj.SITES
    if mj.SITES[site].exists(config) and (name in ("llama_gqa", "gpt2") or site in EACH_KIND)
]
EDITS = (
    lambda value, where: mj.Replace(value, where),
    lambda value, where: mj.Mix(0.5, value, where),
    lambda value, where: mj.Add(value[..., :1], where),
    lambda value, where: mj.Scale(0.5, where),
)


def captured(model, site, padding="left"):
    return mj.run(model, batch(padding, (IDS + 5) % 19), capture=(site,)).acts[site]


def loop(model, tokens, interventions, metric=METRIC):
    return np.asarray(metric(mj.run(model, tokens, interventions)))


def swept(model, tokens, interventions, metric=METRIC, **running):
    return mj.sweep(model, tokens, interventions, metric, progress=False, **running)


@pytest.mark.parametrize("name, site", CASES)
def test_5_a_sweep_is_a_loop_of_runs(x64, name, site):
    """Indices drawn by hypothesis; the edit's kind and the padding go with the site."""
    model, number = random_model(ARCHITECTURES[name]), list(mj.SITES).index(site)
    padding = ("left", "none", "right")[number % 3]
    tokens, value = batch(padding), captured(model, site, padding)
    info = mj.sites(model, tokens)[site]
    sizes = {SELECTS[a]: n for a, n in zip(info.axes, info.shape) if a != "batch"}
    sizes |= {a: SHORTEST for a in ("pos", "query", "key") if a in sizes}
    axes = [a for a in sizes if a != "unit" or len(sizes) < 4][-3:]
    layers = model.sites[site].layers
    if layers is not None and len(layers) < 2:
        axes.remove("layer")
    edit = EDITS[number % 4]

    @settings(max_examples=2)
    @given(
        st.fixed_dictionaries(
            {
                a: st.lists(
                    st.sampled_from(layers) if a == "layer" and layers else st.integers(-sizes[a], sizes[a] - 1),
                    min_size=2,
                    max_size=2,
                    unique=True,
                )
                for a in axes
            }
        )
    )
    def check(choices):
        choices = {a: choices[a] for a in axes}  # hypothesis reorders them
        result = swept(model, tokens, {site: edit(value, mj.grid(**choices))})
        assert result.dims == (*axes, "batch") and result.dtype == np.float64
        for place in np.ndindex(*(2,) * len(axes)):
            where = mj.Where(**{a: choices[a][i] for a, i in zip(axes, place)})
            assert error(result.values[place], loop(model, tokens, {site: edit(value, where)})) < TOLERANCE
        for axis in axes:
            assert result[axis].values.tolist() == choices[axis]
        assert error(result.base, loop(model, tokens, {})) < TOLERANCE

    check()


@pytest.fixture
def model(x64):
    return random_model(ARCHITECTURES["llama_gqa"])


@pytest.mark.parametrize("name", ["llama_gqa", "parallel_mqa_partial_rotary", "bidirectional"])
def test_pairs_of_edits_have_the_product_of_their_grids(x64, name):
    model, tokens = random_model(ARCHITECTURES[name]), batch("left")
    heads, others, layers = mj.grid(layer=[0, 2], head=[1, 3]), mj.grid(layer=[1, 2], head=[0]), mj.grid(pos=[-1, 1])
    result = swept(
        model,
        tokens,
        {
            "z": [mj.Scale(0.0, heads), mj.Scale(2.0, others)],
            "resid_mid" if name == "llama_gqa" else "attn_out": mj.Add(1.0, layers),
        },
    )
    assert result.dims == ("layer", "head", "layer_2", "head_2", "pos", "batch")
    site = "resid_mid" if name == "llama_gqa" else "attn_out"
    for layer, head, other, pos in ((0, 1, 1, -1), (2, 3, 2, 1), (0, 3, 2, 1), (2, 1, 1, -1)):
        where, second = mj.Where(layer=layer, head=head), mj.Where(layer=other, head=0)
        edits = {"z": [mj.Scale(0.0, where), mj.Scale(2.0, second)], site: mj.Add(1.0, mj.Where(pos=pos))}
        cell = result.sel(layer=layer, head=head, layer_2=other, head_2=0, pos=pos)
        assert error(cell, loop(model, tokens, edits)) < TOLERANCE


class Doubled(eqx.Module):
    """A callable with an array, that looks at all positions."""

    factor: jax.Array

    def __call__(self, x, site, layer, positions):
        return x + self.factor * jnp.mean(x, axis=1, keepdims=True) * jnp.where(layer == 1, 1.0, 0.0)


def test_stacks_of_anything(model):
    """Values, bases (which must be whole cells), functions, times a grid."""
    tokens, rng = batch("left"), np.random.default_rng(0)
    bases, values = rng.normal(size=(3, 2, 12)), rng.normal(size=(3, 12))
    project = {i: {"resid_pre": mj.Project(bases[i], mj.Where(layer=1, pos=-1))} for i in range(3)}
    replace = {i: {"resid_pre": mj.Replace(values[i], mj.Where(layer=i, pos=[[-1], [0], [1]]))} for i in range(3)}
    mixing = {i: {"attn_out": Doubled(jnp.asarray(float(i)))} for i in range(3)}
    for choices in (project, replace, mixing):
        result = swept(model, tokens, mj.stack("choice", choices))
        assert result.dims == ("choice", "batch")
        for i, edits in choices.items():
            assert error(result.sel(choice=i), loop(model, tokens, edits)) < TOLERANCE
    grid = mj.grid(layer=range(3))
    result = swept(model, tokens, mj.stack("dose", {d: {"mlp_out": mj.Scale(d, grid)} for d in (0.0, 0.5, 2.0)}))
    assert result.sizes == {"dose": 3, "layer": 3, "batch": 3}
    for dose in (0.0, 2.0):
        for layer in range(3):
            alone = loop(model, tokens, {"mlp_out": mj.Scale(dose, mj.Where(layer=layer))})
            assert error(result.sel(dose=dose, layer=layer), alone) < TOLERANCE
    with pytest.raises(ValueError, match=r"at choice=1 differ in structure or shapes from those at choice=0"):
        mj.stack("choice", {0: {"z": mj.Scale(0.0)}, 1: {"z": mj.Add(0.0)}})
    with pytest.raises(ValueError, match=r"needs a mijax.grid as the where of an edit, or a mijax.stack"):
        swept(model, tokens, {"z": mj.Scale(0.0)})


@pytest.mark.parametrize("padding", ["left", "right"])
def test_fixed_edits_stand_in_the_base_and_in_every_cell(model, padding):
    """Masks, chosen examples, zipped lists, roles, and functions beside the grid."""
    tokens, value = batch(padding), captured(model, "z", padding)
    mask = np.asarray(tokens.mask) & (np.arange(6) % 2 == 0)
    fixed = {
        "resid_pre": mj.Add(0.5, mj.Where(layer=[0, 2], pos=mask)),
        "resid_mid": mj.Scale(0.5, mj.Where(pos=[[-1], [0], [1]], batch=[0, 2])),
        "pattern": mj.Scale(0.5, mj.Where(layer=[1, 2], head=[0, 3], query=[-1, 2], key=[0, 1])),
    }
    kept = lambda edits: {**edits, "z": mj.Scale(2.0, mj.Where(batch=[1], head=np.array([True, False, True, False])))}
    for others in (fixed, kept(fixed), {**fixed, "attn_out": Doubled(jnp.asarray(0.5))}):
        for where in ({"layer": [0, 2], "pos": [-1, 1]}, {"batch": None, "layer": [1]}):
            axes = {a: i for a, i in where.items() if i is not None}
            result = swept(model, tokens, {**others, "mlp_out": mj.Replace(1.0, mj.grid(**axes))})
            assert error(result.base, loop(model, tokens, others)) < TOLERANCE
            for place in np.ndindex(*(len(i) for i in axes.values())):
                selection = mj.Where(**{a: axes[a][i] for a, i in zip(axes, place)})
                edits = {**others, "mlp_out": mj.Replace(1.0, selection)}
                assert error(result.values[place], loop(model, tokens, edits)) < TOLERANCE
    result = swept(model, tokens, mj.stack("who", {i: {"z": mj.Replace(value, mj.Where(batch=i))} for i in range(3)}))
    assert (result.values[~np.eye(3, dtype=bool)] == np.tile(result.base.values, (3, 1))[~np.eye(3, dtype=bool)]).all()
    assert (result.values[np.eye(3, dtype=bool)] != result.base.values).all()


def test_metrics_that_read_any_position_or_some(model):
    tokens, value = batch("left"), captured(model, "resid_pre")
    edits = {"resid_pre": mj.Replace(value, mj.grid(layer=[0, 2], pos=[0, 2, -1]))}

    class Late(eqx.Module):
        pos: jax.Array

        def __call__(self, out):
            return out.readout.logits(pos=0)[:, 3]

    plain = lambda out: out.readout.logits()[:, -2, 5]
    metrics = [mj.metrics.cross_entropy(tokens), plain, mj.metrics.logit([1, 2, 3], pos=[[3], [1], [-2]]), METRIC]
    names = {"a": metrics[2], "b": METRIC}
    together = swept(model, tokens, edits, names)
    for metric in (*metrics, names):
        result = swept(model, tokens, edits, metric) if metric is not names else together["a"]
        for i, layer in enumerate([0, 2]):
            for j, pos in enumerate([0, 2, -1]):
                cell_edits = {"resid_pre": mj.Replace(value, mj.Where(layer=layer, pos=pos))}
                alone = loop(model, tokens, cell_edits, metric if metric is not names else metrics[2])
                assert error(result.values[i, j], alone) < TOLERANCE
    # one that reads elsewhere than it says finds nothing there, and not what stands in the base
    with pytest.warns(UserWarning, match=r"not finite in 6 of 6 cells, the first of them layer=0, pos=0"):
        assert np.isnan(swept(model, tokens, edits, Late(jnp.asarray(-1)))).all()


def test_the_plan_counts_what_must_be_computed(model):
    """Of each cell the tokens from the edited one on, once; nothing of what a last read token does not see."""
    tokens = batch("left")
    cells = cells_of({"resid_pre": mj.Scale(0.0, mj.grid(layer=range(3), pos=range(4)))})
    read = columns_read([METRIC], tokens)
    todo = work(model, tokens, cells, read)
    assert todo.rows().reshape(3, 4).tolist() == [[sum(n - p for n in LENGTHS) for p in range(4)]] * 3
    assert todo.start.reshape(3, 4).tolist() == [[2 * layer] * 4 for layer in range(3)]
    bidirectional = random_model(ARCHITECTURES["bidirectional"])
    assert (work(bidirectional, tokens, cells, read).rows() == sum(LENGTHS)).all()
    early = columns_read([mj.metrics.logit([1, 2, 3], pos=1)], tokens)
    assert work(model, tokens, cells, early).rows().reshape(3, 4)[0].tolist()[2:] == [0, 0]
    later = {"mlp_out": 1, "resid_mid": 1, "z": 0, "embed": None, "ln_final.scale": None}
    for site, half in later.items():
        axes = {"pos": [1]} if half is None else {"layer": [1], "pos": [1]}
        start = work(model, tokens, cells_of({site: mj.Scale(0.0, mj.grid(**axes))}), read).start
        assert start.tolist() == [{"embed": 0, "ln_final.scale": 5}.get(site, 2 + (half or 0))]
    scores = cells_of({"attn_scores": mj.Replace(-np.inf, mj.grid(layer=[1], key=[2]))})
    assert work(model, tokens, scores, read).rows().tolist() == [sum(n - 2 for n in LENGTHS)]


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**31), st.integers(1, 50))
def test_every_cell_is_computed_once_in_chunks_that_hold_it(count, starts, seed, most):
    rng = np.random.default_rng(seed)
    computed = rng.random((3, 7)) < 0.8
    computed[:, 0] = True
    todo = Work(rng.integers(0, starts, count), rng.integers(0, 8, (count, 3)), computed)
    shape = Shape(count, min(starts, count), bool(seed % 2))
    size = capacity(
        todo, shape, bytes_per_row=10, bytes_per_cell=5, memory=10**6, most_rows=most, specialise=seed % 3 == 0
    )
    order = plan(todo, size)
    cells, rows = size.cells, size.rows
    assert rows * 10 + cells * 5 <= 10**6
    seen = []
    for number in range(len(order.bounds) - 1):
        members, chunk = chunk_of(todo, order, number)
        fresh = order.order[order.bounds[number] : order.bounds[number + 1]]
        assert len(members) == cells and len(chunk.rows.cell) == rows and len(fresh)
        assert chunk.start == todo.start[fresh].min()
        assert (chunk.rows.place >= 0).sum() == todo.rows()[fresh].sum() <= rows
        in_slot = chunk.rows.slot[chunk.rows.cell, chunk.rows.example, chunk.rows.within][
            : (chunk.rows.place >= 0).sum()
        ]
        assert in_slot.tolist() == list(range(len(in_slot)))
        used = chunk.rows.place >= 0
        for number, (cell, example, column) in enumerate(zip(*np.nonzero(used))):
            assert chunk.rows.place[cell, example, column] == number
            assert (chunk.rows.cell[number], chunk.rows.example[number], chunk.rows.column[number]) == (
                cell,
                example,
                column,
            )
        seen += fresh.tolist()
    assert sorted(seen) == np.flatnonzero(todo.rows()).tolist()


sizes = st.integers(1, 10**7)


@settings(max_examples=300)
@given(
    st.integers(1, 500),
    st.integers(1, 6),
    st.booleans(),
    sizes,
    sizes,
    st.integers(1, 2000),
    st.integers(0, 10**9),
    st.booleans(),
    st.data(),
)
def test_what_memory_holds_one_cell_is_enough_and_never_exceeded(
    count, starts, by_position, row, cell, most, more, specialise, data
):
    """The smallest plan is one cell and its rows: any memory from there on gives a plan that stays within."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    computed = np.arange(9) < np.array(lengths)[:, None]
    first = np.random.default_rng(count).integers(0, 10, (count, len(lengths)))
    todo = Work(np.arange(count) % starts, first, computed, whole=bool(data.draw(st.booleans())))
    prompts = data.draw(st.integers(1, len(lengths)))
    tokens = tokens_of_cell(todo, prompts, specialise)
    longest = sum(sorted(lengths)[-prompts:]) if specialise and not todo.whole else 9 * prompts
    assert tokens == longest
    for memory in (tokens * row + cell, tokens * row + cell + more):
        size = capacity(
            todo, Shape(count, min(starts, count), by_position), row, cell, memory, most, specialise, prompts
        )
        assert size.cells >= 1 and size.rows >= tokens
        assert size.rows * row + size.cells * cell <= memory
        assert size.rows <= max(most, tokens)


@settings(max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(2, 8),
    st.integers(0, 12),
    st.booleans(),
    st.sampled_from(["z", "resid_pre", "pattern"]),
)
def test_a_sweep_is_refused_where_its_smallest_plan_exceeds_the_memory_and_nowhere_else(
    batch_size, length, eighths, together, site
):
    model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    tokens = mj.Tokens(np.random.default_rng(length).integers(0, 11, (batch_size, length)))
    metric = (lambda out: out.readout.logits(pos=-1)[:, 3]) if together else mj.metrics.log_prob(np.arange(batch_size))
    cells = cells_of({site: mj.Scale(0.0, mj.grid(layer=[0, 1]))})
    job = job_of(model, tokens, cells, {"m": metric}, None)
    least = batch_size if together else 1
    per_row, per_cell = unit_bytes(job, least)
    smallest = least * length * per_row + per_cell
    with pytest.raises(ValueError, match=f"about {smallest:,} bytes, memory={smallest - 1:,} allows none"):
        layout_of(job, smallest - 1)
    memory = smallest + eighths * smallest // 8
    layout = layout_of(job, memory)
    assert layout_bytes(job, layout) <= memory and layout.prompts >= least
    more = -(-batch_size // max(1, -(-batch_size // layout.prompts) - 1))  # in one group less
    if layout.prompts < batch_size:
        rows, cells = unit_bytes(job, more)
        assert more * length * rows + cells > memory


@pytest.mark.parametrize("count", [10, 1000, 1001, 99_991, 100_000])
@pytest.mark.parametrize("memory, most_rows", [(10**6, 500), (4000, 10**9), (4321, 10**9)])
def test_a_chunk_keeps_within_memory_and_rows_however_many_cells_there_are(count, memory, most_rows):
    todo = Work(np.zeros(count, int), np.zeros((count, 3), int), np.ones((3, 7), bool))
    for by_position in (True, False):
        size = capacity(todo, Shape(count, 1, by_position), 10, 5, memory, most_rows, specialise=False)
        assert size.rows <= most_rows and size.rows * 10 + size.cells * 5 <= memory
        full = min(memory / 12, most_rows, count * 12)  # but for the equal parts of chunks, it is used
        assert size.rows >= 0.8 * full


def test_9_new_places_values_answers_and_prompts_compile_nothing(model):
    def run(layers, positions, ids, answers, scale):
        tokens = mj.Tokens(ids, batch("left").mask)
        edits = {"resid_mid": mj.Scale(scale, mj.grid(layer=layers, pos=positions))}
        swept(model, tokens, edits, mj.metrics.logit_diff(answers, [1, 2, 3]))
        mj.patch(model, clean=tokens, corrupted=mj.Tokens((ids + 1) % 19, tokens.mask), site="z", over=("layer", "head"),
                 metric=mj.metrics.logit(answers), progress=False)  # fmt: skip

    run([0, 1], [1, -1], IDS, [4, 5, 6], 0.5)
    with compilations() as seen:
        run([2, 1], [-2, 2], (IDS + 3) % 19, [7, 8, 9], 1.5)
        run([1, 1], [3, 3], IDS[:, ::-1], [7, 8, 9], 1.5)
    assert seen == []


def test_devices_share_the_chunks_and_give_the_same_numbers(model, monkeypatch):
    from mijax.engine import driver as module

    tokens, value = batch("left"), captured(model, "z")
    edits = {"z": mj.Replace(value, mj.grid(layer=range(3), head=range(4), pos=range(4)))}
    cell_memory = len(IDS) * 6 * row_bytes(model, cells_of(edits).edits) + 2 * cell_bytes(model, tokens, {"m": METRIC})
    alone = swept(model, tokens, edits, memory=3 * cell_memory)
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((8,), ("cells",))
    given = []
    original = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda *arguments: given.append(arguments) or original(*arguments))
    assert (swept(model, tokens, edits, memory=3 * cell_memory, mesh=mesh).values == alone.values).all()
    program = original.lower(*given[0]).compile().compiled.as_text()
    assert "num_partitions=8" in program  # and none of them waits for another
    assert not re.search(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective", program)
    both = jax.make_mesh((4, 2), ("cells", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(both, jax.sharding.PartitionSpec(None, None, "model"))
    W_in = jax.device_put(model.blocks.mlp.W_in, split)
    sharded = eqx.tree_at(lambda m: m.blocks.mlp.W_in, model, W_in)
    sharded = jax.tree.map(
        lambda x: x if x is W_in else jax.device_put(x, jax.sharding.NamedSharding(both, jax.sharding.PartitionSpec())),
        sharded,
    )
    assert error(swept(sharded, tokens, edits, memory=3 * cell_memory, mesh=both), alone) < TOLERANCE


def test_the_estimate_bounds_what_the_program_takes():
    """The compiled program's own account: at most what was computed, at least a tenth."""
    from mijax.engine import driver as module

    model = mj.init(mj.Config(n_layers=4, d_model=64, n_heads=4, d_vocab=500, n_ctx=32), jax.random.key(0))
    tokens = mj.Tokens(np.arange(8 * 32).reshape(8, 32) % 500)
    size = lambda out: (
        jnp.sum(out.acts["resid_post"] ** 2, axis=(0, 2, 3)) + jnp.sum(out.acts["pattern"], axis=(0, 2, 3, 4))
    )
    seen = mj.metrics.Function(size, sites=("resid_post", "pattern"))
    for metric in (mj.metrics.logit_diff(1, 2), mj.metrics.cross_entropy(tokens), seen):
        for site, over in (
            ("z", {"layer": range(4), "head": range(4)}),
            ("resid_pre", {"layer": range(4), "pos": range(32)}),
        ):
            cells = canonical_cells(model, cells_of({site: mj.Scale(0.0, mj.grid(**over))}))
            metrics = as_programs(model, tokens, {"m": metric})
            read = columns_read([metric], tokens)
            todo = work(model, tokens, cells, read, metric is seen)
            each = row_bytes(model, cells.edits), cell_bytes(model, tokens, metrics)
            order = plan(todo, capacity(todo, Shape.of(model.causal, cells), *each, 2**28, 2048, specialise=False))
            members, chunk = chunk_of(todo, order, 0)
            kept = module.kept_run(model, tokens, {}, metrics)[2]
            args = (model, tokens, kept, metrics, read, cells.stacked, chunk, *cells.take_split(members))
            taken = module._chunk.lower(*args).compile().compiled.memory_analysis().temp_size_in_bytes
            assert (
                (order.size.rows * each[0] + order.size.cells * each[1]) / 10
                < taken
                <= order.size.rows * each[0] + order.size.cells * each[1]
            )
