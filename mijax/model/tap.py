"""Taps: pure values that a run calls at its sites, to edit activations and to keep them in a state that it carries."""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.display import ShownAsTree
from mijax.model.position import Frame
from mijax.model.sites import Site
from mijax.programs.now import UsersCode

State: TypeAlias = Any
"""What a tap remembers during a run: a pytree of arrays, of whatever structure the tap chooses."""

Result: TypeAlias = Any
"""What a tap gives in `Out.taps`, or keeps of a layer: a pytree of arrays, of whatever structure the tap chooses."""


class Point(NamedTuple):
    """The site at which a tap is called, and where in the run it is.

    Attributes:
        site: the site.
        layer: the number of the layer, traced; `None` at sites outside the layers.
        frame: the positions of the tokens along the activation's axes.
        heads: the heads that the head axis holds; `None` where it holds all.
        copy: whether the activation is not that of the residual stream, but that of a copy of the stream which one head
            reads (a norm's sites, where a head's input was edited): it may be edited, and must not be kept.
    """

    site: Site
    layer: Int[Array, ""] | None
    frame: Frame
    heads: Int[Array, " k"] | None = None
    copy: bool = False


class Tap(UsersCode, ShownAsTree):
    """What a run does at some of its sites: a pytree whose arrays may be vmapped and differentiated.

    The tap is called at `sites` only, and the copies per head of a site are computed only where a tap names that site.
    What a tap remembers is in its state, a pytree of arrays that the run passes from `init` through every call. At the
    beginning of every layer the state has the same structure.

    >>> import jax, mijax as mj
    >>> class Norms(mj.Tap):
    ...     sites = frozenset({"resid_post"})
    ...
    ...     def at(self, point, x, state):
    ...         return x, jax.numpy.linalg.norm(x, axis=-1)
    ...
    ...     def close(self, state):  # the next layer begins with None; the norms of this layer are kept
    ...         return None, state
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.run(model, [[1, 2, 3]], taps=[Norms()]).taps[0].shape
    (2, 1, 3)
    """

    @property
    @abc.abstractmethod
    def sites(self) -> frozenset[str]:
        """The names of the sites at which the tap is called: a property, or an attribute of the class."""

    @abc.abstractmethod
    def at(self, point: Point, x: Array, state: State) -> tuple[Array, State]:
        """Edit or keep an activation.

        At a site that only some layers have (`point.site.layers`), the tap is called in the others too, with NaN; what it
        makes of that has no effect, except on its state.

        Args:
            point: the site, layer and frame.
            x: the activation.
            state: the tap's state.

        Returns:
            The activation with which the run goes on, of the same shape and dtype; and the state.
        """

    def init(self, sites: Mapping[str, Site], frame: Frame, zero: Array) -> State:
        """The state before the run: `None` by default.

        Args:
            sites: the model's table.
            frame: the positions of the run.
            zero: a zero of the model's dtype that varies over a mesh as activations do: build arrays of zeros by
                `jax.lax.full_like(zero, 0, shape=...)`.

        Returns:
            The state.
        """
        del sites, frame, zero

    def close(self, state: State) -> tuple[State, Result]:
        """Finish a layer.

        Args:
            state: the state after the layer.

        Returns:
            The state with which the next layer begins, and arrays to keep of this layer, which are stacked over
            layers: by default the same state, and `None`.
        """
        return state, None

    def result(self, state: State, stacked: Result) -> Result:
        """The result of the tap in the run's output.

        Args:
            state: the state after the run.
            stacked: what `close` kept of each layer, with a leading layer axis.

        Returns:
            By default `stacked`.
        """
        del state
        return stacked

    def heads(self, site: Site) -> Int[Array, " k"]:
        """The heads whose copies must be computed, at a site with a copy per head.

        Args:
            site: the site.

        Returns:
            Their numbers: by default all.
        """
        return all_heads(site)

    def per_layer(self, sites: Mapping[str, Site]) -> tuple[Any, "Tap"]:
        """Split the tap into what differs between layers and what does not.

        Args:
            sites: the model's table.

        Returns:
            Two parts for `equinox.combine`: the arrays with a leading layer axis, of which each layer receives its
            entry, and the rest. By default no arrays, and the tap itself.
        """
        del sites
        return None, self


def all_heads(site: Site) -> Int[Array, " k"]:
    """The numbers of all heads of a site.

    Args:
        site: a site with an axis of heads, from a model's table.

    Returns:
        `[n_heads]`: 0, 1, ...
    """
    assert site.head_axis is not None
    return jnp.arange(site.sizes[site.head_axis], dtype=jnp.int32)


def called(tap: Tap, point: Point, x: Array, state: State) -> tuple[Array, State]:
    """Call a tap at a point, as the run does; for taps that call another tap.

    Args:
        tap: the tap.
        point: the site, layer and frame; a tap that does not name the site is not called.
        x: the activation.
        state: the tap's state.

    Returns:
        The activation after the tap, and the state.

    Raises:
        TypeError: for a tap that does not return a pair.
        ValueError: for a tap that returns an activation of another shape or dtype.

    >>> import mijax as mj
    >>> class Halved(mj.Tap):
    ...     sites = frozenset({"y"})
    ...
    ...     def at(self, point, x, state):
    ...         return x / 2, state
    >>> y = mj.Site("y", ("batch",), "output of a model", "mlp")
    >>> mj.called(Halved(), mj.Point(y, layer=None, frame=None), jnp.ones(2), ())
    (Array([0.5, 0.5], dtype=float32), ())
    """
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
        """No sites."""
        return frozenset()

    def at(self, point: Point, x: Array, state: State) -> tuple[Array, State]:
        """Return the activation unchanged."""
        return x, state


class Chain(Tap):
    """Several taps, called one after the other at every point; the state is a tuple of their states.

    Args:
        taps: the taps.
    """

    taps: tuple[Tap, ...]

    @property
    def sites(self) -> frozenset[str]:
        """The sites of all taps."""
        return frozenset().union(*(tap.sites for tap in self.taps))

    def at(self, point: Point, x: Array, state: State) -> tuple[Array, State]:
        """Call each tap with the activation that the tap before it returned."""
        states = list(state)
        for i, tap in enumerate(self.taps):
            x, states[i] = called(tap, point, x, states[i])
        return x, tuple(states)

    def init(self, sites: Mapping[str, Site], frame: Frame, zero: Array) -> State:
        """A tuple of the taps' initial states."""
        return tuple(tap.init(sites, frame, zero) for tap in self.taps)

    def close(self, state: State) -> tuple[State, Result]:
        """Close each tap."""
        pairs = [tap.close(tap_state) for tap, tap_state in zip(self.taps, state)]
        return tuple(tap_state for tap_state, _ in pairs), tuple(arrays for _, arrays in pairs)

    def result(self, state: State, stacked: Result) -> Result:
        """A tuple of the taps' results."""
        return tuple(tap.result(*arguments) for tap, *arguments in zip(self.taps, state, stacked))

    def heads(self, site: Site) -> Int[Array, " k"]:
        """The heads of all taps one after the other (some may be listed twice), or all heads where that is shorter."""
        heads = [tap.heads(site) for tap in self.taps if site.name in tap.sites]
        full = all_heads(site)
        return (
            heads[0] if len(heads) == 1 else full if sum(h.size for h in heads) >= full.size else jnp.concatenate(heads)
        )

    def per_layer(self, sites: Mapping[str, Site]) -> tuple["Chain", "Chain"]:
        """Split each tap."""
        pairs = [tap.per_layer(sites) for tap in self.taps]
        chain_of = lambda taps: eqx.tree_at(lambda chain: chain.taps, self, tuple(taps))
        return chain_of(layered for layered, _ in pairs), chain_of(rest for _, rest in pairs)


class Visit(NamedTuple):
    """What a model calls at its sites: a tap, with the place in the run.

    Args:
        tap: the tap.
        sites: the model's table.
        frame: the positions of the tokens that are computed.
        layer: the number of the layer; `None` outside the layers.
        copy: as in `Point`.
    """

    tap: Tap
    sites: Mapping[str, Site]
    frame: Frame
    layer: Int[Array, ""] | None = None
    copy: bool = False

    def __call__(self, site: str, x: Array, state: State, heads: Int[Array, " k"] | None = None) -> tuple[Array, State]:
        """Call the tap.

        Args:
            site: the name of the site.
            x: the activation.
            state: the tap's state.
            heads: the heads that the head axis holds; `None` where it holds all.

        Returns:
            The activation after the tap, and the tap's state.
        """
        return called(self.tap, Point(self.sites[site], self.layer, self.frame, heads, self.copy), x, state)

    def heads(self, site: str) -> Int[Array, " k"] | None:
        """The heads whose copies must be computed.

        Args:
            site: the name of a site with a copy per head.

        Returns:
            Their numbers; `None` where the tap is not called there.
        """
        return self.tap.heads(self.sites[site]) if site in self.tap.sites else None
