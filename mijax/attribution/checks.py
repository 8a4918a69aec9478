"""Checks of attribution that come before any run."""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from mijax._types import Array
from mijax.arguments import with_known_values
from mijax.attribution.nodes import Nodes
from mijax.engine.measure import as_shapes, output_like, values_of
from mijax.metrics import AnyMetric
from mijax.model.model import LayeredModel
from mijax.model.tokens import Tokens

T = TypeVar("T")


def check_layered(model: Any) -> None:
    """Check that the layers of a model can be walked.

    Args:
        model: the model.

    Raises:
        TypeError: for anything but a `LayeredModel`.
    """
    if not isinstance(model, LayeredModel):
        raise TypeError(
            f"attribution walks the layers of a model, which those of {type(model).__name__} cannot be: mijax.ablate takes any"
        )


def check_differ(clean: Tokens, corrupted: Tokens) -> None:
    """Check that the two prompts of each example differ.

    Args:
        clean: the prompts, `[batch, pos]`.
        corrupted: the prompts that they are compared with, of the same shape and padding.

    Raises:
        ValueError: where an example has the same real tokens in both batches; it names the first such example.
    """
    same = (np.asarray(clean.ids) == np.asarray(corrupted.ids)) | ~np.asarray(clean.mask)
    if same.all(axis=1).any():
        raise ValueError(
            f"both batches have the same prompt in example {int(np.argmax(same.all(axis=1)))}: nothing to attribute"
        )


def check_nodes(nodes: Mapping[str, Nodes]) -> None:
    """Check that the cells along each dimension are the same at all sites.

    Args:
        nodes: the cells by site.

    Raises:
        ValueError: where two sites have different places along one dimension.
    """
    places: dict[str, Any] = {}
    for site, cells in nodes.items():
        for dim, these in cells.places.items():
            if places.setdefault(dim, these) != these:
                raise ValueError(
                    f"sites with different grids along {dim!r} must be asked for apart; at {site!r} its places are {str(these)[:99]},"
                    f" at another {str(places[dim])[:99]} (key/value heads may be named 'kv_head')"
                )


def check_gradient(model: LayeredModel, tokens: Tokens, name: str, metric: AnyMetric) -> None:
    """Check that JAX has a derivative of a metric, without computing any number.

    A metric whose derivative happens to be zero has one.

    Args:
        model: the model.
        tokens: the prompts.
        name: the name of the metric, for error messages.
        metric: the metric, as `as_programs` returns it.

    Raises:
        TypeError: for a metric that gives complex numbers, and for one that has no derivative with respect to the final
            stream and the activations that it reads.
    """
    dtype, slope = _slope(*as_shapes(model, tokens, {name: metric}))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"metric {name!r} must give real numbers, given {dtype}")
    if not (jnp.issubdtype(dtype, jnp.floating) and slope):
        raise TypeError(
            f"metric {name!r} has no gradient: it does not change with small changes of the final stream (ranks and"
            " accuracies count); take a logit, a probability or a divergence"
        )


@functools.lru_cache
def _slope(leaves: tuple[Any, ...], treedef: Any) -> tuple[Any, bool]:
    """The dtype of a metric, and whether JAX finds any derivative: where there is none it says so by a symbol, not by zeros."""
    (readout, acts, metrics), varies = jax.tree.unflatten(treedef, leaves), []

    @jax.custom_jvp
    def watched(y: Array) -> Array:
        return y

    def rule(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Any]:
        varies.append(not isinstance(tangents[0], SymbolicZero))
        return primals[0], tangents[0]

    watched.defjvp(rule, symbolic_zeros=True)

    def value(seen: Any, readout: Any, metrics: Any) -> Array:
        final, acts = seen
        return watched(next(iter(values_of(metrics, with_final(readout, final), acts).values())))

    along = lambda seen, *others: jax.jvp(lambda seen: value(seen, *others), (seen,), (seen,))
    dtype = eqx.filter_eval_shape(along, (readout.final, acts), readout, metrics)[0].dtype
    return dtype, any(varies)


def with_final(readout: T, final: Array) -> T:
    """Replace the final stream of a readout.

    Args:
        readout: the readout.
        final: the stream that takes the place of its own, `[batch, pos, d_model]`.

    Returns:
        The readout with that stream, and otherwise unchanged.
    """
    return eqx.tree_at(lambda out: out.final, readout, final)


def check_apart(model: LayeredModel, tokens: Tokens, name: str, metric: AnyMetric) -> None:
    """Check that the metric of an example depends on no other example.

    Otherwise the gradient of the sum over examples would not be each example's own. The metrics of the first and of
    the last example are differentiated, at random outputs of a run. A single example passes.

    Args:
        model: the model.
        tokens: the prompts.
        name: the name of the metric, for error messages.
        metric: the metric, as `as_programs` returns it.

    Raises:
        ValueError: where one of these gradients is not zero at another example.
    """
    if len(tokens.ids) == 1:
        return
    rng, like = np.random.default_rng(0), lambda a: isinstance(a, jax.ShapeDtypeStruct)
    random = lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype) if like(a) else a
    axes = {site: model.sites[site].axes.index("batch") for site in output_like(model, tokens, metric)[1]}
    with jax.ensure_compile_time_eval():
        known = with_known_values((*output_like(model, tokens, metric), metric), rng)
        readout, acts, metric = jax.tree.map(random, known, is_leaf=like)
        mixes = bool(_mixes(readout, acts, axes, metric))
    if mixes:
        raise ValueError(
            f"metric {name!r} of an example depends on other examples: give each its own, and take means or differences"
            " between examples of the result"
        )


@eqx.filter_jit
def _mixes(readout: Any, acts: dict[str, Array], axes: dict[str, int], metric: Any) -> Array:
    """Whether the first example's metric, or the last one's, has a gradient with respect to other examples."""
    value = lambda seen: values_of({"": metric}, with_final(readout, seen[0]), (seen[1],))[""]
    values, pull = jax.vjp(value, (readout.final, acts))
    batch = jnp.arange(len(values), dtype=jnp.int32)

    def of(example: int) -> list[Array]:
        final, acts = jax.tree.map(jnp.nan_to_num, pull((batch == example).astype(values.dtype))[0])
        return [final, *(jnp.moveaxis(act, axes[site], 0) for site, act in acts.items())]

    others = [slope[1:] for slope in of(0)] + [slope[:-1] for slope in of(len(values) - 1)]
    return jnp.any(jnp.stack([jnp.any(slope != 0) for slope in others]))
