"""Causal tracing (Meng et al. 2022): the activations that restore a fact after noise on its subject."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mijax import metrics
from mijax._types import Array, ArrayLike, Bool, Float, Int
from mijax.arguments import check_known, whole_number
from mijax.engine.axes import layer_window
from mijax.engine.driver import check_sweep
from mijax.engine.grid import Grid, grid
from mijax.engine.labels import with_positions
from mijax.engine.measure import described
from mijax.engine.options import Running
from mijax.forward import run
from mijax.interventions.edits import Add, Replace
from mijax.interventions.where import Where
from mijax.model.model import LayeredModel
from mijax.model.sites import Site, site_of
from mijax.model.tokens import Tokens, integers
from mijax.sweeps.sweep import sweep

if TYPE_CHECKING:
    import xarray as xr

Severed = Literal["mlp_out", "attn_out"]


def trace(
    model: LayeredModel,
    tokens: Tokens | ArrayLike,
    *,
    subject: Sequence[ArrayLike] | ArrayLike,
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
    """Corrupt the subject's embeddings by noise, restore one place, and measure how much of the answer comes back.

    The noise is normal, `noise` times the standard deviation of all entries of all subjects' token embeddings; its
    draws are the same in the corrupted and in every restored run.

    Args:
        model: the model.
        tokens: the prompts.
        subject: for each prompt, the positions of its subject, or a mask over its columns.
        answer: `[batch]`, the token ids of the objects.
        site: the site that is restored: the hidden state by default, or `mlp_out` or `attn_out` in windows of
            `window` layers.
        pos: the positions that are restored, by name (as in `grid`); by default every position, NaN where a prompt
            lacks it.
        window: the number of layers in a window around each layer.
        severed: with `"mlp_out"` or `"attn_out"`, what MLPs or attention write at the restored position in all
            later layers is held at its corrupted value, which shows what goes through them.
        noise: standard deviations of the noise.
        draws: the number of draws of the noise.
        seed: seed of the noise.
        running: `memory`, `progress`, `save` and `mesh`, as in `sweep`.

    Returns:
        The probabilities of the answer `clean` [batch], `corrupted` [draw, batch] and `restored` [layer, pos, draw,
        batch], and their differences: `total` = clean - corrupted and `indirect` = restored - corrupted, means over
        draws. The average indirect effect is `indirect.mean("batch")`, over the prompts that have a position.

    Raises:
        ValueError: where the model does not give the answer to a prompt (a fact that it does not know cannot be
            traced), where a prompt has no subject, for a site without layers or positions, and what `sweep` raises.
        TypeError: what `sweep` raises.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> known = mj.run(model, [[1, 2, 3]]).logits[:, -1].argmax(-1)
    >>> r = mj.trace(model, [[1, 2, 3]], subject=[[1]], answer=known, draws=4)
    >>> dict(r.restored.sizes)
    {'layer': 2, 'pos': 3, 'draw': 4, 'batch': 1}
    """
    tokens, answer = model.inputs(tokens), np.asarray(answer)
    whole_number("draws", draws, 1)
    whole_number("window", window, 1)
    check_known("trace", (model, tokens))
    entry = site_of(site, model.sites)
    if "pos" not in entry.axes or not entry.has_layer:
        raise ValueError(f"causal tracing restores a site of layers and positions, given {site!r}")
    mask = _subject_mask(tokens, subject)
    ids, real, noisy = (np.tile(np.asarray(x), (draws, 1)) for x in (tokens.ids, tokens.mask, mask))
    repeated, metric, places = (
        Tokens(ids, real),
        metrics.prob(np.tile(answer, draws)),
        _places(tokens, pos, window, draws, entry),
    )

    def edits(corruption: Any, source: Any, corrupted: Any) -> dict[str, Any]:
        acting: dict[str, Any] = {"embed": Add(corruption, Where(pos=noisy)), site: [Replace(source, places)]}
        if severed is not None:  # perhaps the same site, in later layers
            acting[severed] = [*acting.get(severed, []), Replace(corrupted, _later(places, model.n_layers))]
        return acting

    check_sweep(model, repeated, edits(0.0, 0.0, 0.0), metric, running)
    clean, source = _known(model, tokens, answer, site)
    corruption, corrupted = _noise(model, tokens, mask, noise, draws, seed), None
    if severed is not None:
        corrupted = run(model, repeated, {"embed": Add(corruption, Where(pos=noisy))}, capture=(severed,)).acts[severed]
    sources = jnp.tile(source, (1, draws, *(1,) * (source.ndim - 2)))
    restored = sweep(model, repeated, edits(corruption, sources, corrupted), metric, **running)
    attrs = {
        "site": site,
        "window": window,
        "severed": severed or "nothing",
        "noise": noise,
        "seed": seed,
        **described(model),
    }
    return _effects(restored, clean, draws, tokens if pos is None else None).assign_attrs(attrs)


def _subject_mask(tokens: Tokens, subject: Any) -> Bool[np.ndarray, "batch pos"]:
    """The columns of each prompt's subject."""
    positions = np.asarray(tokens.positions)
    if not isinstance(subject, Sequence | np.ndarray) or len(subject) != len(positions):
        raise ValueError(f"subject must be the positions of each of the {len(positions)} prompts, given {subject!r}")
    rows = [_subject_of(example, *pair) for example, pair in enumerate(zip(subject, positions))]
    return np.stack(rows)


def _subject_of(example: int, subject: Any, positions: Int[np.ndarray, " pos"]) -> Bool[np.ndarray, " pos"]:
    """The columns of one prompt's subject."""
    index = integers(subject, f"the subject of prompt {example}")
    if index.ndim != 1 or (index.dtype == bool and index.shape != positions.shape):
        raise ValueError(
            f"the subject of prompt {example} must be a list of positions or a mask over {len(positions)} columns"
        )
    if index.dtype != bool and len(index) == len(positions) > 2 and np.isin(np.asarray(index), (0, 1)).all():
        raise ValueError(
            f"the subject of prompt {example} holds only 0 and 1, one for every column: give a mask as booleans"
        )
    selected = np.asarray(index) & (positions >= 0) if index.dtype == bool else np.isin(positions, np.asarray(index))
    missing = [] if index.dtype == bool else sorted(set(np.asarray(index).tolist()) - set(positions.tolist()))
    if missing:
        raise ValueError(f"prompt {example} has no positions {missing}")
    if not selected.any():
        raise ValueError(f"prompt {example} has no subject")
    return selected


def _known(
    model: LayeredModel, tokens: Tokens, answer: np.ndarray, site: str
) -> tuple[Float[np.ndarray, " batch"], Array]:
    """The answers' probabilities and the clean activations; `ValueError` where the model gives another answer."""
    out = run(model, tokens, capture=(site,))
    rank = np.asarray(metrics.rank(answer)(out))
    if not (rank == 0).all():
        raise ValueError(
            f"the model does not give the answer to prompts {np.flatnonzero(rank != 0).tolist()}: leave them out"
        )
    return np.asarray(metrics.prob(answer)(out)), out.acts[site]


def _noise(
    model: LayeredModel, tokens: Tokens, mask: np.ndarray, scale: float, draws: int, seed: int
) -> Float[Array, "example pos d_model"]:
    """`[draw x batch, pos, d_model]` noise for the embeddings, independent for all draws and prompts."""
    embedded = np.asarray(run(model, tokens, capture=("embed",), readout=False).acts["embed"])[mask]
    spread = scale * embedded.std()
    keys = jax.random.split(jax.random.key(seed), draws)
    position = np.maximum(np.asarray(tokens.positions), 0)  # draws go by position: padding changes none
    shape = (len(position), int(position.max()) + 1, model.sites["embed"].sizes["d_model"])
    draw = lambda key: spread * jax.random.normal(key, shape, embedded.dtype)
    return jnp.concatenate([jnp.take_along_axis(draw(key), position[..., None], axis=1) for key in keys])


def _places(tokens: Tokens, pos: Mapping[str, Any] | None, window: int, draws: int, site: Site) -> Grid:
    """The grid of windows of layers and positions, for prompts repeated `draws` times."""
    lengths, n = np.asarray(tokens.lengths), site.sizes["layer"]
    layers = range(n) if site.layers is None else site.layers
    if pos is None:  # in a shorter prompt, the last position stands in for those that it lacks
        pos = {str(p): np.minimum(p, lengths - 1)[:, None] for p in range(int(lengths.max()))}
        labels: Sequence[Any] = list(map(int, pos))
    else:
        labels = list(pos)
    per_prompt = {name: np.asarray(p) for name, p in pos.items()}
    tiled = {name: np.tile(p, (draws, 1)) if p.ndim == 2 else p for name, p in per_prompt.items()}
    windows = {str(layer): [i for i in layer_window(layer, window, n) if i in layers] for layer in layers}
    return Grid(grid(layer=windows, pos=tiled).where, {"layer": layers, "pos": labels})


def _later(places: Grid, n_layers: int) -> Grid:
    """The grid of the same positions in all layers after the last restored one."""
    last = np.asarray(places.where.layers(n_layers)).reshape(places.size, -1).max(axis=1)
    later = places.where.only("pos").also(layer=np.arange(n_layers) > last[:, None])
    return places.beside(later)


def _effects(
    swept: "xr.DataArray", clean: Float[np.ndarray, " batch"], draws: int, tokens: Tokens | None
) -> "xr.Dataset":
    """The labelled probabilities and effects; `tokens`, where they are at all positions, which some prompts lack."""
    import xarray as xr

    batch, shape = len(clean), swept.shape[:2]
    coords: Any = {dim: swept[dim].values for dim in ("layer", "pos")} | {"draw": range(draws), "batch": range(batch)}
    restored = xr.DataArray(swept.values.reshape(*shape, draws, batch), coords, ("layer", "pos", "draw", "batch"))
    if tokens is not None:
        restored = with_positions(restored, tokens)
    corrupted = xr.DataArray(swept.base.values.reshape(draws, batch), dims=("draw", "batch"))
    result = xr.Dataset({"clean": ("batch", clean), "corrupted": corrupted, "restored": restored})
    mean = lambda probabilities: probabilities.mean("draw", skipna=False)
    return result.assign(total=result.clean - mean(corrupted), indirect=mean(restored) - mean(corrupted))
