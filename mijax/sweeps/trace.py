"""Causal tracing (Meng et al. 2022): which activations bring back a fact that noise on its subject took away."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mijax import metrics
from mijax._types import Array, ArrayLike, Bool, Float
from mijax.engine.axes import layer_window
from mijax.engine.driver import check_sweep
from mijax.engine.grid import Grid, grid
from mijax.engine.measure import described
from mijax.engine.options import Running
from mijax.interventions.edits import Add, Replace
from mijax.interventions.where import Where
from mijax.model.model import LayeredModel
from mijax.model.sites import site_of
from mijax.model.tokens import Tokens
from mijax.run import run
from mijax.sweeps.sweep import sweep

if TYPE_CHECKING:
    import xarray as xr

Severed = Literal["mlp_out", "attn_out"]


def trace(
    model: LayeredModel,
    tokens: Tokens | ArrayLike,
    *,
    subject: Sequence[ArrayLike],
    answer: ArrayLike,
    site: str = "resid_post",
    pos: Mapping[str, Any] | None = None,
    window: int = 1,
    severed: Severed | None = None,
    noise: float = 3.0,
    draws: int = 10,
    seed: int = 0,
    **running: Unpack[Running],
) -> "xr.Dataset":
    """Corrupt the subject's token embeddings by noise, restore one place, and see how much of the answer comes back.

    `subject` lists each prompt's positions of its subject, `answer` the token ids [batch] of the objects. The noise is
    normal, `noise` times the standard deviation of all entries of all subjects' token embeddings; its `draws` are the
    same in the corrupted and in every restored run. Restored is `site` (the hidden state by default; `mlp_out` and
    `attn_out` in windows of `window` layers), at every layer and position (NaN where a prompt has not that many), or at the named
    ones of `pos` (as in `grid`).
    With `severed`, what the MLPs (or attention) write at the restored position in all later layers is held at
    its corrupted value, which shows what goes through them.

    Gives the probabilities of the answer `clean` [batch], `corrupted` [draw, batch] and `restored` [layer, pos, draw,
    batch], and their differences: `total` = clean - corrupted and `indirect` = restored - corrupted, means over draws.
    The average indirect effect is `indirect.mean("batch")`.

    Raises `ValueError` where the model does not give the answer to a prompt (a fact that it does not know cannot be
    traced), or a prompt has no subject.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> known = mj.run(model, [[1, 2, 3]]).logits[:, -1].argmax(-1)
    >>> r = mj.trace(model, [[1, 2, 3]], subject=[[1]], answer=known, draws=4)
    >>> dict(r.restored.sizes)
    {'layer': 2, 'pos': 3, 'draw': 4, 'batch': 1}
    """
    tokens, answer = model.inputs(tokens), np.asarray(answer)
    restores = site_of(site, model.sites)
    if "pos" not in restores.axes or not restores.has_layer:
        raise ValueError(f"causal tracing restores a site of layers and positions, given {site!r}")
    mask = _subject_mask(tokens, subject)
    ids, real, noisy = (np.tile(np.asarray(x), (draws, 1)) for x in (tokens.ids, tokens.mask, mask))
    many, metric, places = (
        Tokens(ids, real),
        metrics.prob(np.tile(answer, draws)),
        _places(model, tokens, pos, window, draws),
    )

    def edits(corruption: Any, source: Any, corrupted: Any) -> dict[str, Any]:
        restored = {"embed": Add(corruption, Where(pos=noisy)), site: Replace(source, places)}
        held = {} if severed is None else {severed: Replace(corrupted, _later(places, model.n_layers))}
        return restored | held

    check_sweep(model, many, edits(0.0, 0.0, 0.0), metric, running)
    clean, source = _known(model, tokens, answer, site)
    corruption, corrupted = _noise(model, tokens, mask, noise, draws, seed), None
    if severed is not None:
        corrupted = run(model, many, {"embed": Add(corruption, Where(pos=noisy))}, capture=(severed,)).acts[severed]
    every = jnp.tile(source, (1, draws, *(1,) * (source.ndim - 2)))
    restored = sweep(model, many, edits(corruption, every, corrupted), metric, **running)
    told = {
        "site": site,
        "window": window,
        "severed": severed or "nothing",
        "noise": noise,
        "seed": seed,
        **described(model),
    }
    if pos is None:  # blank what a shorter prompt has not
        lengths = restored.base.copy(data=np.tile(np.asarray(tokens.lengths), draws))
        restored = restored.where(restored.pos < lengths.reset_coords(drop=True))
    return _effects(restored, clean, draws).assign_attrs(told)


def _subject_mask(tokens: Tokens, subject: Sequence[Any]) -> Bool[np.ndarray, "batch pos"]:
    positions = np.asarray(tokens.positions)
    if len(subject) != len(positions):
        raise ValueError(f"subject has positions for {len(subject)} prompts, the batch has {len(positions)}")
    for example, (own, row) in enumerate(zip(subject, positions)):
        missing = set(map(int, own)) - set(row.tolist())
        if not len(own) or missing:
            raise ValueError(
                f"prompt {example} has no subject"
                if not len(own)
                else f"prompt {example} has no positions {sorted(missing)}"
            )
    return np.stack([np.isin(row, np.asarray(own)) for own, row in zip(subject, positions)])


def _known(
    model: LayeredModel, tokens: Tokens, answer: np.ndarray, site: str
) -> tuple[Float[np.ndarray, " batch"], Array]:
    """The probability of the answers, and the clean activations; raises where an answer is not the model's."""
    out = run(model, tokens, capture=(site,))
    rank = np.asarray(metrics.rank(answer)(out))
    if (rank > 0).any():
        raise ValueError(
            f"the model does not give the answer to prompts {np.flatnonzero(rank > 0).tolist()}: leave them out"
        )
    return np.asarray(metrics.prob(answer)(out)), out.acts[site]


def _noise(
    model: LayeredModel, tokens: Tokens, mask: np.ndarray, scale: float, draws: int, seed: int
) -> Float[Array, "example pos d_model"]:
    """`[draw x batch, pos, d_model]`: independent of one another."""
    embedded = np.asarray(run(model, tokens, capture=("embed",), readout=False).acts["embed"], np.float32)[mask]
    spread = scale * embedded.std()
    keys = jax.random.split(jax.random.key(seed), draws)
    shape = model.sites["embed"].shape(*tokens.ids.shape)
    return jnp.concatenate([spread * jax.random.normal(key, shape, embedded.dtype) for key in keys])


def _places(model: LayeredModel, tokens: Tokens, pos: Mapping[str, Any] | None, window: int, draws: int) -> Grid:
    n, lengths = model.n_layers, np.asarray(tokens.lengths)
    if pos is None:  # where prompts differ in length, the last position stands in for those that one has not
        pos = {str(p): np.minimum(p, lengths - 1)[:, None] for p in range(int(lengths.max()))}
        labels: Sequence[Any] = list(map(int, pos))
    else:
        labels = list(pos)
    per_prompt = {name: np.asarray(p) for name, p in pos.items()}
    tiled = {name: np.tile(p, (draws, 1)) if p.ndim == 2 else p for name, p in per_prompt.items()}
    layers = {str(layer): layer_window(layer, window, n) for layer in range(n)}
    return Grid(grid(layer=layers, pos=tiled).where, {"layer": list(range(n)), "pos": labels})


def _later(places: Grid, n_layers: int) -> Grid:
    """The same positions in all layers after the last restored one."""
    last = np.asarray(places.where.layers(n_layers)).reshape(places.size, -1).max(axis=1)
    later = places.where.only("pos").also(layer=np.arange(n_layers) > last[:, None])
    return places.beside(later)


def _effects(restored: "xr.DataArray", clean: Float[np.ndarray, " batch"], draws: int) -> "xr.Dataset":
    import xarray as xr

    batch, shape = len(clean), restored.shape[:2]
    coords = {dim: restored[dim] for dim in ("layer", "pos")}
    data = {
        "clean": ("batch", clean),
        "corrupted": (("draw", "batch"), restored.base.values.reshape(draws, batch)),
        "restored": (("layer", "pos", "draw", "batch"), restored.values.reshape(*shape, draws, batch)),
    }
    told = xr.Dataset(data, coords={**coords, "draw": np.arange(draws), "batch": np.arange(batch)})
    lost = told.corrupted.mean("draw")
    return told.assign(total=told.clean - lost, indirect=told.restored.mean("draw") - lost)
