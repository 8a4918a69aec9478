"""Models around other models, which act at some of their sites and may add sites."""

import abc
import math
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from mijax._types import Array, ArrayLike, Asked, Bool, Int, Stream
from mijax.model.model import LayeredModel
from mijax.model.position import Columns, Frame, Whole
from mijax.model.readout import Readout
from mijax.model.tap import State, Tap
from mijax.model.tokens import Inputs, Tokens


class Wrapper(LayeredModel):
    """A model around another model that acts at some of its sites, and may add sites; abstract.

    A subclass defines `sites`, those of the inner model and any that it adds; and `around(tap)`, the tap that is called
    in the inner model, which calls `tap`, at the added sites too. Everything that runs the inner model also runs the
    wrapper: captures, edits, sweeps, attribution, generation.

    Args:
        model: the inner model.
    """

    model: eqx.AbstractVar[LayeredModel]

    @abc.abstractmethod
    def around(self, tap: Tap) -> Tap:
        """The tap that is called in the inner model in place of `tap`.

        Args:
            tap: the tap of the run.

        Returns:
            A tap that calls `tap`, at the added sites too, and does what the wrapper does.
        """

    @property
    def dtype(self) -> jnp.dtype:
        """The inner model's."""
        return self.model.dtype

    @property
    def name(self) -> str:
        """The inner model's."""
        return self.model.name

    @property
    def identity(self) -> object:
        """The identities of the wrapper's class and of the inner model."""
        return super().identity, self.model.identity

    @property
    def n_layers(self) -> int:
        """The inner model's."""
        return self.model.n_layers

    @property
    def causal(self) -> bool:
        """The inner model's."""
        return self.model.causal

    @property
    def has_halves(self) -> bool:
        """The inner model's."""
        return self.model.has_halves

    @property
    def layer_bytes(self) -> int:
        """The inner model's."""
        return self.model.layer_bytes

    @property
    def d_vocab(self) -> int:
        """The inner model's."""
        return self.model.d_vocab

    @property
    def n_ctx(self) -> int:
        """The inner model's."""
        return self.model.n_ctx

    def inputs(self, values: Any) -> Tokens:
        """The inner model's."""
        return self.model.inputs(values)

    def check(self) -> None:
        """The inner model's."""
        self.model.check()

    def check_inputs(self, inputs: Inputs) -> None:
        """The inner model's."""
        self.model.check_inputs(inputs)

    def bad_inputs(self, inputs: Inputs) -> Bool[Array, ""]:
        """The inner model's."""
        return self.model.bad_inputs(inputs)

    def frame(self, inputs: Any) -> Whole:
        """The inner model's."""
        return self.model.frame(inputs)

    def frame_of(self, tokens: Tokens, columns: Int[Array, " pos"], alone: bool = False) -> Columns:
        """The inner model's."""
        return self.model.frame_of(tokens, columns, alone)

    def embed(self, ids: Int[Array, "batch pos"], frame: Frame, tap: Tap, state: State) -> tuple[Stream, State]:
        """The inner model's, with the wrapped tap."""
        return self.model.embed(ids, frame, self.around(tap), state)

    def walk(
        self, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None, **how: Any
    ) -> tuple[Any, Any]:
        """The inner model's, with the wrapped tap in every layer."""
        return self.model.walk(lambda layer, carry, x: body(self._around(layer), carry, x), carry, xs, **how)

    def layer(self, index: int) -> "AroundLayer":
        """The inner model's, with the wrapped tap."""
        return self._around(self.model.layer(index))

    def final(self, x: Stream, frame: Frame, tap: Tap, state: State) -> tuple[Stream, State]:
        """The inner model's, with the wrapped tap."""
        return self.model.final(x, frame, self.around(tap), state)

    def readout(self, final: Stream, tokens: Tokens) -> Readout:
        """The inner model's."""
        return self.model.readout(final, tokens)

    def numbers_per_token(self, sites: Iterable[str]) -> int:
        """The inner model's, plus those of the added sites at which a tap is called."""
        names = set(sites)
        inner = names & self.model.sites.keys()
        added = [self.sites[name] for name in names - inner]
        return self.model.numbers_per_token(inner) + sum(3 * math.prod(site.shape(1, 1)) for site in added)

    def numbers_per_batch(self, batch: int, pos: int) -> int:
        """The inner model's."""
        return self.model.numbers_per_batch(batch, pos)

    @property
    def products_per_token(self) -> int:
        """The inner model's."""
        return self.model.products_per_token

    def _around(self, layer: Any) -> "AroundLayer":
        return AroundLayer(self, layer)


class AroundLayer(eqx.Module):
    """A layer of a wrapper: the inner model's layer, with the wrapped tap.

    Attributes:
        wrapper: the wrapper.
        inside: the inner model's layer.
    """

    wrapper: Wrapper
    inside: Any

    @property
    def index(self) -> Int[Array, ""]:
        """The number of the layer."""
        return self.inside.index

    def __call__(self, x: Stream, frame: Frame, tap: Tap, state: State, *rest: ArrayLike | Any) -> tuple[Asked, State]:
        """Run the layer: see `mijax.model.walk.Layer`."""
        return self.inside(x, frame, self.wrapper.around(tap), state, *rest)
