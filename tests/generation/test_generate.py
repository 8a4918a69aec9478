"""Generation: cached as uncached (law 8, float64, 1e-10), sampling as its distribution says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.architectures import ARCHITECTURES, IDS, batch, error, example, existing, random_model, real
from tests.compilations import compilations

CAUSAL = [name for name, config in ARCHITECTURES.items() if config.causal]
NEW = 5


def edits_for(model, tokens):
    """Edits of every kind, on prompt and new tokens, none of which looks ahead."""
    config, width = model.config, tokens.ids.shape[1] + NEW
    rng = np.random.default_rng(0)
    new, ends = mj.new_tokens(tokens, NEW), np.asarray(tokens.lengths)[:, None] + NEW
    by_position = rng.normal(size=(config.n_layers, 3, width, config.n_heads, config.d_head))

    def ramp(x, site, layer, positions):
        return x + 0.1 * jnp.maximum(positions, 0).astype(x.dtype)[:, :, None]

    edits = {
        "resid_pre": [
            mj.Add(rng.normal(size=config.d_model), mj.Where(layer=1, pos=new)),
            mj.Scale(0.9, mj.Where(pos=ends - 2)),
        ],
        "z": mj.Replace(
            by_position, mj.Where(layer=2, head=[0, 1], pos=np.concatenate([0 * ends + 1, ends - 1], axis=1))
        ),
        "result": mj.Mix(0.5, rng.normal(size=config.d_model), mj.Where(head=-1, pos=new)),
        "q_input": mj.Scale(1.2, mj.Where(head=1)),
        "k": mj.Add(by_position[:, :, :, : config.n_kv_heads], mj.Where(layer=0)),
        "v_input": mj.Project(rng.normal(size=(2, config.d_model)), mj.Where(layer=1, head=0, pos=new)),
        "attn_scores": mj.Add(1.0, mj.Where(key=0, query=np.concatenate([0 * ends + 2, ends - 1], axis=1))),
        "pattern": mj.Scale(0.5, mj.Where(head=0, key=1)),
        "attn_out": ramp,
    }
    return edits


def prefix(tokens, ids, mask, column):
    return mj.Tokens(ids[:, : column + 1], mask[:, : column + 1])


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_8_cached_is_uncached_under_every_kind_of_edit(x64, name, padding):
    model, tokens = random_model(ARCHITECTURES[name]), batch(padding)
    edits, table = edits_for(model, tokens), tuple(mj.sites(model, tokens))
    out = mj.generate(model, tokens, edits, max_new_tokens=NEW, capture=table)
    width = tokens.ids.shape[1]
    assert out.ids.shape == (3, width + NEW) and (out.ids[:, :width] == tokens.ids).all()
    # the finished text, run in one go without a cache, has the same activations everywhere ...
    finished = mj.Tokens(out.ids, out.mask)
    whole = mj.run(model, finished, edits, capture=table)
    for site in table:
        for i in range(3):
            mine, theirs = (existing(model, site, example(a[site], site, finished, i)) for a in (out.acts, whole.acts))
            if site == "attn_scores":  # before the mask: a token's score with later ones is never computed
                mine, theirs = np.tril(mine), np.tril(theirs)
            assert error(mine, theirs) < 1e-10, site
    # ... and each token is the likeliest after what stands before it
    best = np.asarray(jnp.argmax(whole.logits, axis=-1))
    for i in range(3):
        columns = real(finished, i)
        start = len(columns) - NEW
        assert (best[i, columns[start - 1 : -1]] == np.asarray(out.ids)[i, columns[start:]]).all()
    plain = mj.run(model, finished, capture=("resid_post",)).acts["resid_post"]
    assert (
        error(example(out.acts["resid_post"], "resid_post", finished, 0), example(plain, "resid_post", finished, 0))
        > 1e-3
    )


def test_each_step_is_a_run_of_the_text_so_far(x64):
    """The loop that a person would write: no cache, the whole text again for every token."""
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")
    ids, mask = np.asarray(tokens.ids), np.asarray(tokens.mask)
    steer = np.random.default_rng(0).normal(size=12)
    for _ in range(NEW):
        edits = {"resid_mid": mj.Add(steer, mj.Where(layer=1))}
        best = np.asarray(mj.run(model, mj.Tokens(ids, mask), edits).readout.logits(pos=-1)).argmax(-1)
        ids, mask = np.concatenate([ids, best[:, None]], 1), np.concatenate([mask, np.ones((3, 1), bool)], 1)
    out = mj.generate(model, tokens, {"resid_mid": mj.Add(steer, mj.Where(layer=1))}, max_new_tokens=NEW)
    assert (np.asarray(out.ids) == ids).all() and (np.asarray(out.mask) == mask).all()


@pytest.mark.parametrize("site, where", [
    ("z", {"layer": [2, 0], "pos": [-1, 0, 6], "head": 1}), ("rot_k", {"layer": 1, "pos": [[0], [-1], [2]], "unit": [0, 3]}),
    ("v", {"head": 1}), ("pattern", {"query": -1, "key": [0, -2], "layer": -1}), ("embed", {"pos": -1, "batch": [2, 0]}),
])  # fmt: skip
def test_narrowed_captures(x64, site, where):
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")
    out = mj.generate(model, tokens, max_new_tokens=NEW, capture={site: mj.Where(**where)})
    whole = mj.run(model, mj.Tokens(out.ids, out.mask), capture={site: mj.Where(**where)})
    assert error(out.acts[site], whole.acts[site]) < 1e-10


def test_several_samples_by_vmap_over_keys_and_sampling_follows_the_distribution():
    """2,000 draws of one next token: the counts' chi-square against the distribution, below its 99.9 % point."""
    model = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32)
    ids, keys = IDS[:1], jax.random.split(jax.random.key(0), 2000)
    logits = np.asarray(mj.run(model, ids).readout.logits(pos=-1))[0].astype(np.float64)
    p = np.exp(logits / 8 - np.max(logits / 8))
    p /= p.sum()
    order = np.argsort(-p)
    cut_k, cut_p, cut_m = p.copy(), p.copy(), p.copy()
    cut_k[order[4:]] = 0
    needed = int(np.searchsorted(np.cumsum(p[order]), 0.6)) + 1
    cut_p[order[needed:]] = 0
    cut_m[p < 0.4 * p.max()] = 0
    for settings, expected in (({}, p), ({"top_k": 4}, cut_k), ({"top_p": 0.6}, cut_p), ({"min_p": 0.4}, cut_m)):
        draw = lambda key, settings=settings: mj.generate(
            model, ids, max_new_tokens=1, temperature=8.0, key=key, **settings
        ).ids[0, -1]
        drawn = np.bincount(jax.jit(jax.vmap(draw))(keys), minlength=19)
        expected = expected / expected.sum()
        assert (drawn[expected == 0] == 0).all() and (expected > 0).sum() > 1
        kept = expected * 2000 > 5
        statistic = ((drawn - expected * 2000) ** 2)[kept] / (expected * 2000)[kept]
        from scipy.stats import chi2

        assert statistic.sum() < chi2.ppf(0.999, kept.sum() - 1), settings


def test_stop_tokens_end_a_continuation():
    model, tokens = random_model(ARCHITECTURES["llama_gqa"], dtype=jnp.float32), batch("right")
    free = mj.generate(model, tokens, max_new_tokens=NEW)
    stop = int(free.ids[1, 7])  # the second new token of the second prompt
    out = mj.generate(model, tokens, max_new_tokens=NEW, stop=(stop,))
    for row, ended, mask in zip(np.asarray(free.ids), np.asarray(out.ids), np.asarray(out.mask)):
        new = row[6:].tolist()
        length = new.index(stop) + 1 if stop in new else NEW
        assert ended[6 : 6 + length].tolist() == new[:length] and not ended[6 + length :].any()
        assert mask[6:].tolist() == [True] * length + [False] * (NEW - length)
    assert not out.mask[1, -1]


def test_one_compilation_serves_a_shape():
    model = random_model(ARCHITECTURES["llama_gqa"], dtype=jnp.float32)

    def generate(shift, temperature, k, seed):
        steer = mj.Add(np.ones(12, np.float32) * shift, mj.Where(layer=shift, pos=mj.new_tokens(IDS, 3)))
        tokens = batch("left", (IDS + shift) % 19)
        return mj.generate(
            model,
            tokens,
            {"resid_post": steer},
            max_new_tokens=3,
            temperature=temperature,
            top_k=k,
            key=jax.random.key(seed),
            stop=(shift,),
        ).ids

    np.asarray(generate(1, 0.7, 5, 0))
    with compilations() as compiled:
        np.asarray(generate(2, 1.3, 9, 1))
    assert compiled == []


def test_more_new_tokens_within_a_bucket_compile_nothing_and_are_as_by_themselves():
    """Masks and operands with an axis of positions have other shapes for each number of new tokens."""
    model = random_model(ARCHITECTURES["llama_gqa"], dtype=jnp.float32)
    numbers = np.random.default_rng(0).normal(size=(3, 16, 12)).astype(np.float32)

    def generate(count, **more):
        tokens = batch("left")
        edits = {
            "resid_post": mj.Add(numbers[:, : 6 + count] * 2, mj.Where(layer=1), axes=("layer", "pos", "unit")),
            "z": mj.Scale(2.0, mj.Where(pos=mj.new_tokens(tokens, count))),
            "attn_scores": mj.Replace(-np.inf, mj.Where(key=0)),
        }
        return mj.generate(model, tokens, edits, max_new_tokens=count, **more)

    longest = np.asarray(generate(10).ids)
    with compilations() as compiled:
        texts = {count: jax.tree.map(np.asarray, generate(count)) for count in (2, 4, 9)}
    assert compiled == []
    for count, done in texts.items():
        assert done.ids.shape == done.mask.shape == (3, 6 + count) and (done.ids == longest[:, : 6 + count]).all()
        assert (generate(count, capture=("z",)).ids == done.ids).all()  # compiled for as many as there are


def test_the_last_token_of_the_context_may_be_followed_by_one_that_is_not_run():
    model = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32)
    done = mj.generate(model, IDS, max_new_tokens=11)
    assert done.ids.shape == (3, 17)  # the context has 16
    for column in (15, 16):
        expected = mj.run(model, done.ids[:, :column]).logits[:, -1].argmax(-1)
        assert (np.asarray(done.ids[:, column]) == np.asarray(expected)).all()
    mask = mj.new_tokens(IDS, 11)
    steered = mj.generate(model, IDS, {"resid_post": mj.Scale(0.0, mj.Where(pos=mask))}, max_new_tokens=11)
    assert steered.ids.shape == (3, 17) and (steered.ids[:, 6] == done.ids[:, 6]).all()
    with pytest.raises(ValueError, match="6 tokens and 12 new ones exceed the context of 16 by 1"):
        mj.generate(model, IDS, max_new_tokens=12)
    with pytest.raises(ValueError, match="6 tokens and 11 new ones exceed the context of 16 by 1"):
        mj.generate(model, IDS, max_new_tokens=11, capture=("z",))


def test_no_token_is_run_after_every_text_has_stopped():
    """Counted by a callback in an edit, which is called wherever a token is run."""
    model, runs = random_model(ARCHITECTURES["llama_gqa"], dtype=jnp.float32), []

    def counting(x, site, layer, positions):
        jax.debug.callback(lambda layer: runs.append(int(layer)), layer)
        return x

    free = np.asarray(mj.generate(model, IDS, max_new_tokens=8).ids)
    for stop in ((), tuple(int(t) for t in free[[0, 1, 2], [7, 8, 7]])):
        runs.clear()
        done = mj.generate(model, IDS, {"resid_pre": counting}, max_new_tokens=8, stop=stop)
        jax.effects_barrier()
        ends = [row.tolist().index(next(t for t in row if t in stop)) for row in free[:, 6:]] if stop else [7, 7, 7]
        assert runs.count(0) == 1 + max(ends), (stop, ends)  # the prompt, and every new token but the last
        assert np.asarray(done.mask).sum(axis=1).tolist() == [7 + end for end in ends]


def test_low_precision_and_a_batch_of_one():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_model(ARCHITECTURES["llama_gqa"], dtype=jnp.float32))
    out = mj.generate(model, IDS[:1], max_new_tokens=3, capture=("z",))
    assert out.ids.shape == (1, 9) and out.acts["z"].dtype == jnp.float32


MODEL = mj.init(ARCHITECTURES["llama_gqa"], jax.random.key(0))
FAULTS = {
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, given 0"),
    "context": ({"max_new_tokens": 20}, "prompts of 6 tokens and 20 new ones exceed the context of 16 by 9"),
    "stop": ({"stop": (3, 19)}, "stop token 19 is outside the vocabulary of 19"),
    "cold": ({"temperature": -1.0, "key": jax.random.key(0)}, "temperature must be one number, at least 0, given -1.0"),
    "no key": ({"temperature": 1.0}, "sampling .* needs a key"),
    "nothing to cut": ({"top_k": 3}, "top_k, top_p and min_p cut a distribution"),
    "ranges": ({"temperature": 1.0, "key": jax.random.key(0), "top_k": 0, "top_p": 0.0, "min_p": 2.0}, r"top_k must be at least 1, given 0; top_p must be in \(0, 1\], given 0.0; min_p must be in \[0, 1\], given 2.0"),
    "position": ({"interventions": {"z": mj.Scale(0.0, mj.Where(pos=9))}}, "pos=9 is out of range at site 'z': the pos axis of example 1 has 9 entries"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_settings(fault, as_a_user):
    settings, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        mj.generate(MODEL, batch("left"), **{"max_new_tokens": NEW, **settings})


def test_models_and_edits_that_look_ahead_are_refused():
    with pytest.raises(ValueError, match="a bidirectional model cannot generate"):
        mj.generate(mj.init(ARCHITECTURES["bidirectional"], jax.random.key(0)), IDS, max_new_tokens=1)

    def shuffle(x, site, layer, positions):
        return x[:, ::-1]

    with pytest.raises(ValueError, match="'z' mixes positions"):
        mj.generate(MODEL, IDS, {"z": shuffle}, max_new_tokens=1)


def test_out_of_range_inside_a_trace_is_minus_one():
    run = jax.jit(
        lambda layer: mj.generate(MODEL, IDS, {"z": mj.Scale(0.0, mj.Where(layer=layer))}, max_new_tokens=2).ids
    )
    assert (np.asarray(run(1)) >= 0).all() and (np.asarray(run(3))[:, -2:] == -1).all()
