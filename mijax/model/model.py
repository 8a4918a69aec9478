"""What `run` runs: a protocol, of which the transformer is one kind, a wrapper around it another, and a model of your own a third."""

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Asked, Bool, Int, Stream
from mijax.model.position import Columns, Frame, Sight, Whole
from mijax.model.readout import Readout
from mijax.model.sites import Site
from mijax.model.tap import Nothing, Tap
from mijax.model.tokens import Inputs, Tokens, as_tokens


class Model(eqx.Module):
    """A model that can be run, edited, captured and ablated by whole runs; abstract.

    A model of your own says which named points it has (`sites`), takes its inputs (`inputs`), and calls the tap at each point on
    its way (`forward`). Its arrays are its parameters: they may be vmapped and differentiated.

    >>> import jax, mijax as mj
    >>> class Doubled(mj.Model):
    ...     weight: jax.Array
    ...
    ...     @property
    ...     def sites(self):
    ...         return {"y": mj.Site("y", ("batch", "unit"), "twice the product", "mlp", fixed=(("unit", 2),))}
    ...
    ...     @property
    ...     def dtype(self):
    ...         return self.weight.dtype
    ...
    ...     def forward(self, inputs, frame, tap, state):
    ...         visit = mj.Visit(tap, self.sites, frame)
    ...         return visit("y", 2 * inputs.values @ self.weight, state)
    >>> model = Doubled(jnp.eye(2))
    >>> mj.run(model, jnp.ones((1, 2)), {"y": mj.Scale(0.0, mj.Where(unit=1))}).readout.tolist()
    [[2.0, 0.0]]
    """

    users_code = True

    @property
    @abc.abstractmethod
    def sites(self) -> Mapping[str, Site]:
        """Its named points, by name; each entry holds the sizes of the axes that do not depend on the inputs (`fixed`)."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """That of every activation."""

    @abc.abstractmethod
    def forward(self, inputs: Inputs, frame: Frame, tap: Tap, state: Any) -> tuple[Any, Any]:
        """What it makes of its inputs, a pytree of arrays with the examples in front, and the tap's state.

        At each site it calls `x, state = visit("name", x, state)`, with `visit = mijax.Visit(tap, self.sites, frame)`.
        """

    @property
    def name(self) -> str:
        """What results call it."""
        return type(self).__name__

    @property
    def identity(self) -> Any:
        """What a saved result must know of it beside its arrays."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def inputs(self, given: Any) -> Inputs:
        """A batch as `forward` takes it; by default any array with the examples in front."""
        return given if isinstance(given, Inputs) else Inputs(given)

    def check(self) -> None:
        """Raise `ValueError` for parameters that do not fit together: nothing is known of them by default."""

    def check_inputs(self, inputs: Inputs) -> None:
        """Raise `ValueError` for inputs that it cannot take: nothing is known of them by default."""
        del inputs

    def bad_inputs(self, inputs: Inputs) -> Bool[Array, ""]:
        """Whether there are inputs that it cannot take, once values are known."""
        del inputs
        return jnp.zeros((), bool)

    def frame(self, inputs: Inputs) -> Frame:
        """The positions of a batch."""
        positions = inputs.positions
        return Whole(
            positions, positions, jnp.asarray(inputs.lengths), Sight(jnp.ones((*positions.shape, 1), bool), None)
        )

    @property
    def n_layers(self) -> int:
        """How many layers `walk` walks; a model that is run whole has none."""
        return 0

    @property
    def causal(self) -> bool:
        """Whether tokens see no later ones."""
        return False

    @property
    def has_halves(self) -> bool:
        """Whether a layer's MLP waits for its attention, so that a run can begin between them."""
        return False

    def output_like(self, inputs: Inputs, **keywords: Any) -> Any:
        """What a metric sees as `out.readout`, with a `jax.ShapeDtypeStruct` (of these `keywords`) for what differs between runs."""
        forward = lambda model, inputs: model.forward(inputs, model.frame(inputs), Nothing(), None)[0]
        shapes = eqx.filter_eval_shape(forward, self, inputs)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, **keywords), shapes)

    def numbers_per_token(self, sites: Iterable[str]) -> int:
        """How many numbers are held at once for each token that is computed, where the model is tapped at `sites`."""
        del sites
        return 0

    def numbers_per_batch(self, batch: int, pos: int) -> int:
        """How many numbers are held at once for each batch that is computed, whatever of it is: all activations, by default."""
        return sum(math.prod(site.shape(batch, pos)) for site in self.sites.values())

    @property
    def products_per_token(self) -> int:
        """How many products of two numbers a layer computes for a token: the size of its matrices."""
        matrices = sum(a.size for a in jax.tree.leaves(self) if eqx.is_array(a) and a.ndim > 1)
        return matrices // max(1, self.n_layers)


class LayeredModel(Model):
    """A model of tokens whose layers can be walked, so that runs resume in mid-model; abstract."""

    @abc.abstractmethod
    def frame(self, inputs: Any) -> Whole:
        """The positions of a batch."""

    @abc.abstractmethod
    def frame_of(self, tokens: Tokens, columns: Int[Array, " pos"], alone: bool = False) -> Columns:
        """The positions of some columns of a batch, which attend to all of it, or to one another `alone`."""

    @abc.abstractmethod
    def embed(self, ids: Int[Array, "batch pos"], frame: Frame, tap: Tap, state: Any) -> tuple[Stream, Any]:
        """The residual stream before the first layer, and the tap's state."""

    @abc.abstractmethod
    def walk(
        self, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None, **how: Any
    ) -> tuple[Any, Any]:
        """Run `body(layer, carry, x) -> carry, y` on the layers in turn: see `mijax.model.walk.walk`."""

    @abc.abstractmethod
    def layer(self, index: int) -> Callable[..., tuple[Asked, Any]]:
        """One layer, as a walk's body is given it."""

    @abc.abstractmethod
    def final(self, x: Stream, frame: Frame, tap: Tap, state: Any) -> tuple[Stream, Any]:
        """The stream as the unembedding reads it, and the tap's state."""

    @abc.abstractmethod
    def readout(self, final: Stream, tokens: Tokens) -> Readout:
        """The final stream of a batch with the unembedding."""

    @property
    @abc.abstractmethod
    def layer_bytes(self) -> int:
        """The bytes of the parameters of one layer."""

    @property
    @abc.abstractmethod
    def d_vocab(self) -> int:
        """How many tokens there are."""

    @property
    @abc.abstractmethod
    def n_ctx(self) -> int:
        """How many tokens it takes at most."""

    def inputs(self, given: Any) -> Tokens:
        """Prompts: tokens as they are, or plain ids of which every one is real."""
        return as_tokens(given)

    def forward(self, inputs: Any, frame: Frame, tap: Tap, state: Any) -> tuple[Readout, Any]:
        """A plain run."""
        x, state = self.embed(jnp.asarray(inputs.ids), frame, tap, state)
        step = lambda layer, carry, _: (layer(carry[0], frame, tap, carry[1]), None)
        (x, state), _ = self.walk(step, (x, state))
        x, state = self.final(x, frame, tap, state)
        return self.readout(x, inputs), state

    def output_like(self, inputs: Any, **keywords: Any) -> Readout:
        """A readout whose final stream is a shape."""
        shape = self.sites["final_in"].shape(*inputs.ids.shape)
        empty = self.readout(jax.device_put(np.zeros(shape, self.dtype)), inputs)  # which compiles nothing
        return eqx.tree_at(lambda out: out.final, empty, jax.ShapeDtypeStruct(shape, self.dtype, **keywords))


class Wrapper(LayeredModel):
    """A model around another one, that does something at some of its sites and may add sites of its own; abstract.

    `model` is the one that is run; `around(tap)` gives the tap that is called in it, which calls `tap`, at the added sites too.
    Everything that runs the other model then runs this one: captures, edits, sweeps, attribution, generation.
    """

    model: eqx.AbstractVar[LayeredModel]

    @abc.abstractmethod
    def around(self, tap: Tap) -> Tap:
        """The tap that is called at the sites of `model`."""

    @property
    def dtype(self):
        """That of the model inside."""
        return self.model.dtype

    @property
    def name(self):
        """That of the model inside."""
        return self.model.name

    @property
    def identity(self):
        """That of the model inside, and what is around it."""
        return super().identity, self.model.identity

    @property
    def n_layers(self):
        """As inside."""
        return self.model.n_layers

    @property
    def causal(self):
        """As inside."""
        return self.model.causal

    @property
    def has_halves(self):
        """As inside."""
        return self.model.has_halves

    @property
    def layer_bytes(self):
        """As inside."""
        return self.model.layer_bytes

    @property
    def d_vocab(self):
        """As inside."""
        return self.model.d_vocab

    @property
    def n_ctx(self):
        """As inside."""
        return self.model.n_ctx

    def inputs(self, given):
        """As inside."""
        return self.model.inputs(given)

    def check(self):
        """As inside."""
        self.model.check()

    def check_inputs(self, inputs):
        """As inside."""
        self.model.check_inputs(inputs)

    def bad_inputs(self, inputs):
        """As inside."""
        return self.model.bad_inputs(inputs)

    def frame(self, inputs):
        """As inside."""
        return self.model.frame(inputs)

    def frame_of(self, tokens, columns, alone=False):
        """As inside."""
        return self.model.frame_of(tokens, columns, alone)

    def embed(self, ids, frame, tap, state):
        """With the tap around."""
        return self.model.embed(ids, frame, self.around(tap), state)

    def walk(self, body, carry, xs=None, **how):
        """With the tap around in every layer."""
        return self.model.walk(lambda layer, carry, x: body(self._around(layer), carry, x), carry, xs, **how)

    def layer(self, index):
        """With the tap around."""
        return self._around(self.model.layer(index))

    def final(self, x, frame, tap, state):
        """With the tap around."""
        return self.model.final(x, frame, self.around(tap), state)

    def readout(self, final, tokens):
        """As inside."""
        return self.model.readout(final, tokens)

    def numbers_per_token(self, sites):
        """Those inside, and of the added sites that are tapped."""
        inside = [name for name in sites if name in self.model.sites]
        added = [self.sites[name] for name in sites if name not in inside]
        return self.model.numbers_per_token(inside) + sum(3 * math.prod(site.shape(1, 1)) for site in added)

    def numbers_per_batch(self, batch, pos):
        """As inside."""
        return self.model.numbers_per_batch(batch, pos)

    @property
    def products_per_token(self):
        """As inside."""
        return self.model.products_per_token

    def _around(self, layer: Any) -> Any:
        return AroundLayer(self, layer)


class AroundLayer(eqx.Module):
    """A layer of a wrapper: that of the model inside, with the tap around."""

    wrapper: Wrapper
    inside: Any

    @property
    def index(self) -> Int[Array, ""]:
        """Its number."""
        return self.inside.index

    def __call__(self, x: Stream, frame: Frame, tap: Tap, state: Any, *rest: ArrayLike | Any) -> tuple[Asked, Any]:
        """The stream after the layer, and the tap's state."""
        return self.inside(x, frame, self.wrapper.around(tap), state, *rest)
