"""While generating, an edit acts on what its user means, or says that it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.architectures import error
from tests.situations import refused
from tests.situations.models import GQA, model, padded

STEER = 50 * np.eye(8, dtype=np.float32)[0]
NEW = 4


def by_hand(transformer, ids, columns):
    """A plain loop: the whole text again for each token, with the edit at those of its columns that are named."""
    ids = list(ids)
    for _ in range(NEW):
        named = [c for c in columns if c < len(ids)]
        edits = {"resid_post": mj.Add(STEER, mj.Where(layer=1, pos=named))} if named else None
        ids.append(int(np.argmax(mj.run(transformer, [ids], edits).logits[0, -1])))
    return ids


@pytest.mark.parametrize("config", [None, GQA])
@pytest.mark.parametrize("tokens, columns", [
    (mj.prompt_tokens, [0, 1, 2]), (mj.new_tokens, [3, 4, 5, 6]), (mj.current_tokens, [2, 3, 4, 5, 6]),
])  # fmt: skip
def test_steering_the_prompt_the_new_or_the_current_tokens(config, tokens, columns):
    transformer = model() if config is None else model(config)
    edits = {"resid_post": mj.Add(STEER, mj.Where(layer=1, pos=tokens([[1, 2, 3]], NEW)))}
    assert np.asarray(mj.generate(transformer, [[1, 2, 3]], edits, max_new_tokens=NEW).ids)[0].tolist() == by_hand(
        transformer, [1, 2, 3], columns
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_current_tokens_of_padded_prompts(side):
    tokens = padded(side)
    edits = {"resid_post": mj.Add(STEER, mj.Where(layer=1, pos=mj.current_tokens(tokens, NEW)))}
    done = mj.generate(model(), tokens, edits, max_new_tokens=NEW)
    for i, (prompt, last) in enumerate((([1, 2, 3, 4], 3), ([5, 6], 1))):
        row = np.asarray(done.ids)[i][np.asarray(done.mask)[i]].tolist()
        assert row == by_hand(model(), prompt, range(last, 10))


@pytest.mark.parametrize("where", [{"pos": -1}, {"pos": [0, -2]}, {"pos": [[-1]]}, {"layer": 1, "pos": np.int32(-1)}])
def test_steering_at_minus_one(where):
    with refused(
        ValueError, "counts from the end of a text that is not there yet: .*prompt_tokens.*new_tokens.*current_tokens"
    ):
        mj.generate(model(), [[1, 2, 3]], {"resid_post": mj.Add(STEER, mj.Where(**where))}, max_new_tokens=NEW)


def test_steering_at_a_traced_minus_one_gives_no_tokens():
    go = lambda pos: (
        mj.generate(model(), [[1, 2, 3]], {"resid_post": mj.Add(STEER, mj.Where(pos=pos))}, max_new_tokens=2).ids
    )
    assert (np.asarray(jax.jit(go)(jnp.int32(-1)))[0, 3:] == -1).all() and (
        np.asarray(jax.jit(go)(jnp.int32(1))) >= 0
    ).all()


def test_a_score_edit_at_the_last_key():
    with refused(ValueError, "key=-1 at site 'attn_scores' counts from the end"):
        mj.generate(model(), [[1, 2, 3]], {"attn_scores": mj.Replace(-np.inf, mj.Where(key=-1))}, max_new_tokens=NEW)


def test_an_edit_of_the_last_new_token_alone():
    edits = {"resid_post": mj.Add(STEER, mj.Where(layer=2, pos=3 + NEW - 1))}
    with refused(ValueError, "acts on the last new token alone, from which nothing is read or kept"):
        mj.generate(model(), [[1, 2, 3]], edits, max_new_tokens=NEW)
    kept = mj.generate(model(), [[1, 2, 3]], edits, max_new_tokens=NEW, capture=("resid_post",)).acts["resid_post"]
    plain = mj.generate(model(), [[1, 2, 3]], max_new_tokens=NEW, capture=("resid_post",)).acts["resid_post"]
    assert np.allclose(kept[2, 0, -1] - plain[2, 0, -1], STEER, atol=1e-3) and np.allclose(
        kept[:, :, :-1], plain[:, :, :-1]
    )


@pytest.mark.parametrize("where", [{"pos": np.zeros((1, 3), bool)}, {"head": [False, False]}, {"batch": [False]}])
def test_a_mask_that_selects_nothing(where):
    with refused(ValueError, "selects nothing: its mask over"):
        mj.run(model(), [[1, 2, 3]], {"z": mj.Replace(0.0, mj.Where(**where))})


def test_generation_ends_at_the_tokenizers_end_token():
    plain = mj.generate(model(), [[1, 2, 3]], max_new_tokens=NEW)
    end = int(plain.ids[0, 3])
    ended = mj.generate(model(), mj.Tokens([[1, 2, 3]], end_tokens=(end,)), max_new_tokens=NEW)
    assert np.asarray(ended.mask)[0].tolist() == [True] * 4 + [False] * (NEW - 1)
    assert (
        mj.generate(model(), mj.Tokens([[1, 2, 3]], end_tokens=(end,)), max_new_tokens=NEW, stop=()).ids == plain.ids
    ).all()


@pytest.mark.parametrize("count", [np.int64(2), np.int32(2), jnp.int32(2)])
def test_a_count_that_is_no_python_number(count):
    assert (
        mj.generate(model(), [[1, 2]], max_new_tokens=count, stop=np.int64(99 % 11)).ids
        == mj.generate(model(), [[1, 2]], max_new_tokens=2, stop=[0]).ids
    ).all()


def test_scores_of_keys_that_were_not_there_yet_are_nan():
    """Of the largest score, float32 rounding is some 1e-7: two programs sum in different orders."""
    done = mj.generate(model(), [[1, 2, 3]], max_new_tokens=2, capture=("attn_scores",))
    given = np.asarray(done.acts["attn_scores"])
    whole = np.asarray(mj.run(model(), done.ids, capture=("attn_scores",)).acts["attn_scores"])
    seen = np.arange(5)[None] <= np.maximum(np.arange(5)[:, None], 2)
    assert error(given[..., seen], whole[..., seen]) < 1e-5 and np.isnan(given[..., ~seen]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_over_padding_alone(side):
    mask = ~np.asarray(padded(side).mask)
    with refused(ValueError, "at site 'resid_post' selects nothing: 'pos' is at padding alone"):
        mj.run(model(), padded(side), {"resid_post": mj.Replace(0.0, mj.Where(pos=mask))})


@pytest.mark.parametrize(
    "where", [{"query": 0, "key": 2}, {"query": [[0], [1]], "key": [[-1], [-1]]}, {"query": [0, 1], "key": [2, 3]}]
)
def test_keys_that_the_queries_cannot_see(where):
    """Cut by name, that is an error; a run changes nothing, so that a loop over all pairs of positions is a sweep."""
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8]]
    with refused(ValueError, r"edge 'cut' \(queries, keys\) never acts: its queries come before its keys"):
        mj.knock_out(model(), prompts, {"cut": (where["query"], where["key"])}, mj.metrics.logit(3), progress=False)
    edit = {"attn_scores": mj.Replace(-np.inf, mj.Where(layer=0, **where))}
    assert np.array_equal(mj.run(model(), prompts, edit).logits, mj.run(model(), prompts).logits)


def test_the_last_new_token_by_a_mask():
    mask = np.zeros((1, 7), bool)
    mask[0, 6] = True
    edit = {"resid_post": mj.Scale(0.0, mj.Where(pos=mask))}
    with refused(ValueError, "acts on the last new token alone"):
        mj.generate(model(), [[1, 2, 3]], edit, max_new_tokens=NEW)


@pytest.mark.parametrize(
    "site, layer", [("resid_post", 0), ("attn_out", 0), ("z", 1), ("z", np.array([False, True, True]))]
)
def test_an_edit_above_what_is_kept(site, layer):
    with refused(ValueError, "acts above all that is captured"):
        edit = {site: mj.Scale(2.0, mj.Where(layer=layer))}
        mj.run(model(), [[1, 2, 3]], edit, capture={"z": mj.Where(layer=0)}, readout=False)


def test_an_edit_of_the_same_layer_below_what_is_kept():
    keep = {"capture": {"z": mj.Where(layer=0)}, "readout": False}
    edit = {"attn_scores": mj.Replace(-np.inf, mj.Where(layer=0, key=0))}
    kept, plain = (np.asarray(mj.run(model(), [[1, 2, 3]], e, **keep).acts["z"]) for e in (edit, None))
    assert (kept[:, :, 0] == 0).all() and np.abs(kept - plain).max() > 0.1


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("mix", [
    lambda x: x - x.mean(1, keepdims=True), lambda x: jnp.cumsum(x, axis=1), lambda x: jnp.where(x > x[:, -1:], x, 0.0),
])  # fmt: skip
def test_a_function_that_mixes_positions_while_generating(mix, width):
    """Also through a `partial`, and in one layer only."""
    in_one = lambda scale, x, site, layer, positions: jnp.where(layer == 2, mix(x), x)
    with refused(ValueError, "'mlp_out' mixes positions"):
        edit = {"mlp_out": jax.tree_util.Partial(in_one, 1.0)}
        mj.generate(model(), [list(range(1, width + 1))], edit, max_new_tokens=3)


def test_a_function_of_keys_heads_and_examples_while_generating():
    """Only positions are computed apart; inside the user's `jit` too."""
    normalise = lambda x, site, layer, positions: (
        x / jnp.maximum(x.sum(-1, keepdims=True), 1e-6) - 0.0 * x.mean((0, 1), keepdims=True)
    )
    go = lambda model: mj.generate(model, [[1, 2, 3], [3, 2, 1]], {"pattern": normalise}, max_new_tokens=3).ids
    assert (np.asarray(go(model())) == np.asarray(jax.jit(go)(model()))).all()


STEP = np.full(8, 5.0, np.float32)


@pytest.mark.parametrize("edit", [
    lambda x, site, layer, positions: x.at[:, 0].add(STEP), lambda x, site, layer, positions: x.at[:, -1].add(STEP),
    lambda x, site, layer, positions: x.at[:, 5].set(0.0), lambda x, site, layer, positions: x * positions.max().astype(x.dtype),
    lambda x, site, layer, positions: x.at[:, 2].set(x[:, 1]),
])  # fmt: skip
def test_a_function_of_columns_while_generating(edit):
    """A new token is computed alone: column 0 is then another one than in the whole text."""
    with refused(ValueError, "mixes positions, or reads a certain column of x"):
        mj.generate(model(), [[1, 2, 3], [4, 5, 6]], {"resid_post": edit}, max_new_tokens=3)


def test_a_function_of_positions_while_generating():
    first = lambda x, site, layer, positions: x + jnp.where((positions == 0)[..., None], STEP, 0.0)
    ids = np.asarray(mj.generate(model(), [[1, 2, 3]], {"resid_post": first}, max_new_tokens=3).ids)[0].tolist()
    text = [1, 2, 3]
    for _ in range(3):
        text.append(int(np.argmax(mj.run(model(), [text], {"resid_post": first}).logits[0, -1])))
    assert ids == text


def test_examples_that_a_mask_over_positions_leaves_out():
    mask = np.array([[True, False, False], [False, False, False]])
    with refused(ValueError, "selects nothing"):
        mj.run(model(), [[1, 2, 3], [4, 5, 6]], {"z": mj.Scale(0.0, mj.Where(batch=1, pos=mask))})


def test_an_edge_from_a_key_to_a_query():
    cut = lambda edge: mj.knock_out(model(), [[1, 2, 3]], {"edge": edge}, mj.metrics.logit(7), progress=False)
    with refused(ValueError, r"edge 'edge' \(queries, keys\) never acts"):
        cut((0, 2))
    assert np.abs(cut((2, 0)) - cut((2, 0)).base).max() > 1e-3


@pytest.mark.parametrize("field", ["pos", "query", "key"])
def test_a_mask_of_zeros_and_ones(field):
    """As `attention_mask` is given elsewhere: indices 0 and 1, if it were taken for indices."""
    site = "resid_post" if field == "pos" else "attn_scores"
    for mask in ([0, 1, 1, 0], [[0, 1, 1, 0]]):
        with refused(ValueError, "holds only 0 and 1, one for every column"):
            mj.run(model(), [[1, 2, 3, 4]], {site: mj.Scale(0.0, mj.Where(**{field: np.array(mask)}))})


def test_choices_of_different_length_are_no_masks_and_no_orders():
    """A grid fills up a shorter choice: first position or all, the early heads or all."""
    prompts, metric = [[1, 2, 3, 4], [5, 6, 7, 8]], mj.metrics.logit(3)
    source = mj.run(model(), [[2, 3, 4, 5], [1, 1, 1, 2]], capture=("z",)).acts["z"]
    everything = {
        "z": mj.Replace(source, mj.grid(head={"first": [0], "all": range(2)}, pos={"bos": [0], "all": range(4)}))
    }
    effects = mj.sweep(model(), prompts, everything, metric, progress=False)
    for i, head in enumerate(([0], [0, 1])):
        for j, pos in enumerate(([0], [0, 1, 2, 3])):
            pairs = [mj.Replace(source, mj.Where(head=h, pos=p)) for h in head for p in pos]
            assert np.allclose(effects.values[i, j], metric(mj.run(model(), prompts, {"z": pairs})), atol=1e-5)
    alone = mj.sweep(
        model(), prompts, {"z": mj.Scale(0.0, mj.grid(pos={"bos": [0], "all": range(4)}))}, metric, progress=False
    )
    assert np.allclose(alone.values[1], metric(mj.run(model(), prompts, {"z": mj.Scale(0.0)})), atol=1e-5)
    with refused(ValueError, "holds only 0 and 1, one for every column"):
        masks = mj.grid(pos={"subject": [0, 1, 1, 0], "rest": [1, 0, 0, 1]})
        mj.sweep(model(), prompts, {"z": mj.Scale(0.0, masks)}, metric, progress=False)


def test_zeros_and_ones_in_a_zipped_list_are_positions():
    edit = {"z": mj.Scale(0.0, mj.Where(layer=[0, 1, 2, 2], pos=[0, 1, 0, 1], head=[0, 0, 1, 1]))}
    each = {
        "z": [
            mj.Scale(0.0, mj.Where(layer=n, pos=p, head=h)) for n, p, h in ((0, 0, 0), (1, 1, 0), (2, 0, 1), (2, 1, 1))
        ]
    }
    zipped, apart = (np.asarray(mj.run(model(), [[1, 2, 3, 4]], e).logits) for e in (edit, each))
    assert np.allclose(zipped, apart, atol=1e-5)
