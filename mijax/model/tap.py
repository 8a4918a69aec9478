"""What a run calls at its sites: pure values, which may edit an activation and keep it in a state that the run carries."""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.model.position import Frame
from mijax.model.sites import Site


class Point(NamedTuple):
    """A site in a run, as a tap is called there.

    `layer` is the layer's number (traced; `None` at sites without layers), `frame` holds the positions of the tokens that
    stand there. `heads` are those that the head axis holds, where it does not hold all. At a `copy` the activation is not the
    site's own, but that of the stream as one head alone sees it: it may be edited, and is not to be kept.
    """

    site: Site
    layer: Int[Array, ""] | None
    frame: Frame
    heads: Int[Array, " k"] | None = None
    copy: bool = False


class Tap(eqx.Module):
    """What a run does at some of its sites: a pytree whose arrays may be vmapped and differentiated.

    `sites` names them; the tap is called at no others, and a copy per head is computed only where some tap has it.
    A tap keeps what it keeps in its state, a pytree of arrays of its own, which goes through the run from `init`
    through every call, and has one structure whenever a layer begins.

    >>> import jax, mijax as mj
    >>> class Norms(mj.Tap):
    ...     sites = frozenset({"resid_post"})
    ...
    ...     def at(self, point, x, state):
    ...         return x, jax.numpy.linalg.norm(x, axis=-1)
    ...
    ...     def close(self, state):  # the next layer begins with nothing; this one's norms are kept
    ...         return None, state
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.run(model, [[1, 2, 3]], taps=[Norms()]).taps[0].shape
    (2, 1, 3)
    """

    users_code = True

    @property
    @abc.abstractmethod
    def sites(self) -> frozenset[str]:
        """The names of the sites at which it is called: a property, or an attribute of the class."""

    @abc.abstractmethod
    def at(self, point: Point, x: Array, state: Any) -> tuple[Array, Any]:
        """What stands at a point after this tap, and the state: `x` as it is to be, of the same shape and dtype."""

    def init(self, sites: Mapping[str, Site], frame: Frame, zero: Array) -> Any:
        """The state before the run: none by default. `sites` are the model's, `zero` is a zero of its dtype, which varies over a
        mesh as activations do: build arrays of zeros by `jax.lax.full_like(zero, 0, shape=...)`."""
        del sites, frame, zero

    def close(self, state: Any) -> tuple[Any, Any]:
        """The state with which the next layer begins, and what of this layer's is kept, to be stacked over layers."""
        return state, None

    def result(self, state: Any, stacked: Any) -> Any:
        """What the run gives of the tap: what was kept layer by layer, by default."""
        del state
        return stacked

    def heads(self, site: Site) -> Int[Array, " k"]:
        """The heads of a copy per head that must be computed."""
        return all_heads(site)

    def per_layer(self, sites: Mapping[str, Site]) -> tuple[Any, "Tap"]:
        """The tap in two parts, for `equinox.combine`: its arrays with one entry per layer in front, of which each layer
        is given its own, and the rest."""
        del sites
        return None, self


def all_heads(site: Site) -> Int[Array, " k"]:
    """The numbers of all heads of a site."""
    assert site.head_axis is not None
    return jnp.arange(site.sizes[site.head_axis], dtype=jnp.int32)


def called(tap: Tap, point: Point, x: Array, state: Any) -> tuple[Array, Any]:
    """What stands at a point after a tap, and the tap's state; `ValueError` for an activation of another shape or dtype."""
    if point.site.name not in tap.sites:
        return x, state
    result = tap.at(point, x, state)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"{type(tap).__name__}.at must return the activation and the state, given {type(result).__name__}"
        )
    after, state = result
    if (after.shape, after.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"{type(tap).__name__} at site {point.site.name!r} returned {after.dtype}{list(after.shape)}, expected"
            f" {x.dtype}{list(x.shape)}"
        )
    return after, state


class Nothing(Tap):
    """The tap that is called nowhere."""

    users_code = False

    @property
    def sites(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def at(self, point, x, state):
        """As it was."""
        return x, state


class Chain(Tap):
    """Several taps, one after the other at every point; the state is a tuple of theirs."""

    taps: tuple[Tap, ...]

    @property
    def sites(self) -> frozenset[str]:
        """Those of any."""
        return frozenset().union(*(tap.sites for tap in self.taps))

    def at(self, point, x, state):
        """What is left by each is given to the next."""
        after = list(state)
        for i, tap in enumerate(self.taps):
            x, after[i] = called(tap, point, x, after[i])
        return x, tuple(after)

    def init(self, sites, frame, zero):
        """Each one's own."""
        return tuple(tap.init(sites, frame, zero) for tap in self.taps)

    def close(self, state):
        """Each one's own."""
        pairs = [tap.close(own) for tap, own in zip(self.taps, state)]
        return tuple(after for after, _ in pairs), tuple(kept for _, kept in pairs)

    def result(self, state, stacked):
        """Each one's own."""
        return tuple(tap.result(*own) for tap, *own in zip(self.taps, state, stacked))

    def heads(self, site):
        """Those that any asks for."""
        heads = [tap.heads(site) for tap in self.taps if site.name in tap.sites]
        every = all_heads(site)
        return (
            heads[0]
            if len(heads) == 1
            else every
            if sum(h.size for h in heads) >= every.size
            else jnp.concatenate(heads)
        )

    def per_layer(self, sites):
        """Each one's own."""
        pairs = [tap.per_layer(sites) for tap in self.taps]
        of = lambda taps: eqx.tree_at(lambda chain: chain.taps, self, tuple(taps))
        return of(own for own, _ in pairs), of(rest for _, rest in pairs)


class Visit(NamedTuple):
    """A tap on its way through one layer of a run, or around the layers."""

    tap: Tap
    sites: Mapping[str, Site]
    frame: Frame
    layer: Int[Array, ""] | None = None
    copy: bool = False

    def __call__(self, site: str, x: Array, state: Any, heads: Int[Array, " k"] | None = None) -> tuple[Array, Any]:
        """What stands at a site after the tap, and the tap's state."""
        return called(self.tap, Point(self.sites[site], self.layer, self.frame, heads, self.copy), x, state)

    def heads(self, site: str) -> Int[Array, " k"] | None:
        """The heads of a copy per head that must be computed; `None` where no tap is called there."""
        return self.tap.heads(self.sites[site]) if site in self.tap.sites else None
