"""The protocol of what `run` runs: transformers, wrappers around them, and models that users write."""

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Asked, Bool, Int, Stream
from mijax.display import ShownAsTree
from mijax.model.position import Columns, Frame, Sight, Whole
from mijax.model.readout import Readout
from mijax.model.sites import Site
from mijax.model.tap import Nothing, State, Tap
from mijax.model.tokens import Inputs, Tokens, as_tokens
from mijax.programs.now import UsersCode

Output: TypeAlias = Any
"""What a model computes: a pytree of arrays with a leading axis of examples, of whatever structure the model chooses."""


class Model(UsersCode, ShownAsTree):
    """A model that can be run, edited, captured and ablated by whole runs; abstract.

    A subclass names the points of its forward pass (`sites`), converts its inputs (`inputs`), and calls the tap at each
    point (`forward`). Its arrays are its parameters: they may be vmapped and differentiated.

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

    @property
    @abc.abstractmethod
    def sites(self) -> Mapping[str, Site]:
        """The sites by name; each entry holds the sizes of the axes that do not depend on the inputs (`fixed`)."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of every activation."""

    @abc.abstractmethod
    def forward(self, inputs: Inputs, frame: Frame, tap: Tap, state: State) -> tuple[Output, State]:
        """The forward pass.

        At each site it calls `x, state = visit("name", x, state)`, with `visit = mijax.Visit(tap, self.sites, frame)`.

        Args:
            inputs: a batch, as `self.inputs` returns it.
            frame: its positions, as `self.frame` returns them.
            tap: what to call at the sites.
            state: the tap's state.

        Returns:
            The output, a pytree of arrays with a leading axis of examples; and the tap's state.
        """

    @property
    def name(self) -> str:
        """The model's label in results."""
        return type(self).__name__

    @property
    def identity(self) -> object:
        """A value that, beside the arrays, tells this model from others: saved results are compared by it."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def inputs(self, values: Any) -> Inputs:
        """Convert what the user passes to a batch as `forward` takes it.

        Args:
            values: by default any array with a leading axis of examples, or `Inputs`.

        Returns:
            The batch.
        """
        return values if isinstance(values, Inputs) else Inputs(values)

    def check(self) -> None:
        """Check the parameters; by default nothing is checked.

        Raises:
            ValueError: in a subclass, for parameters that do not fit together.
        """

    def check_inputs(self, inputs: Inputs) -> None:
        """Check a batch; by default nothing is checked.

        Args:
            inputs: a batch, as `self.inputs` returns it.

        Raises:
            ValueError: in a subclass, for inputs that the model cannot take.
        """
        del inputs

    def bad_inputs(self, inputs: Inputs) -> Bool[Array, ""]:
        """The check of `check_inputs` on traced values, which cannot raise; by default nothing is bad.

        Args:
            inputs: a batch, as `self.inputs` returns it.

        Returns:
            A scalar: whether the batch holds inputs that the model cannot take.
        """
        del inputs
        return jnp.zeros((), bool)

    def frame(self, inputs: Inputs) -> Frame:
        """The positions of a batch.

        Args:
            inputs: a batch, as `self.inputs` returns it.

        Returns:
            The frame that `forward` takes.
        """
        positions = inputs.positions
        return Whole(positions, positions, jnp.asarray(inputs.lengths), Sight(causal=False))

    @property
    def n_layers(self) -> int:
        """The number of layers that `walk` iterates over; 0 for a model that is always run as a whole."""
        return 0

    @property
    def causal(self) -> bool:
        """Whether tokens attend to no later tokens."""
        return False

    @property
    def has_halves(self) -> bool:
        """Whether a layer's MLP reads the output of its attention, so that a run can begin between them."""
        return False

    def output_like(self, inputs: Inputs, **keywords: Any) -> Output:
        """What a metric sees as `out.readout`, with shapes in place of the arrays that differ between runs.

        Args:
            inputs: a batch, as `self.inputs` returns it.
            **keywords: further arguments of `jax.ShapeDtypeStruct`.

        Returns:
            The output of `forward`, with a `jax.ShapeDtypeStruct` for each such array.
        """
        forward = lambda model, inputs: model.forward(inputs, model.frame(inputs), Nothing(), None)[0]
        shapes = eqx.filter_eval_shape(forward, self, inputs)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, **keywords), shapes)

    def numbers_per_token(self, sites: Iterable[str]) -> int:
        """How many numbers are in memory at once for each computed token: 0 by default.

        Args:
            sites: the names of the sites at which a tap is called.

        Returns:
            The count, from which the sizes of chunks are estimated.
        """
        del sites
        return 0

    def numbers_per_batch(self, batch: int, pos: int) -> int:
        """How many numbers are in memory at once for each batch, however many of its tokens are computed.

        Args:
            batch: the number of examples.
            pos: the number of positions.

        Returns:
            The count: by default the size of all activations.
        """
        return sum(math.prod(site.shape(batch, pos)) for site in self.sites.values())

    @property
    def products_per_token(self) -> int:
        """How many multiplications a layer takes per token: the total size of its matrices."""
        matrices = sum(a.size for a in jax.tree.leaves(self) if eqx.is_array(a) and a.ndim > 1)
        return matrices // max(1, self.n_layers)


class LayeredModel(Model):
    """A model of tokens with a walk over its layers, so that runs can resume between layers; abstract."""

    @abc.abstractmethod
    def frame(self, inputs: Any) -> Whole:
        """The positions of a batch."""

    @abc.abstractmethod
    def frame_of(self, tokens: Tokens, columns: Int[Array, " pos"], alone: bool = False) -> Columns:
        """The positions of some columns of a batch.

        Args:
            tokens: the whole batch.
            columns: indices of its columns.
            alone: whether the columns attend to one another only, not to the whole batch.

        Returns:
            Their frame.
        """

    @abc.abstractmethod
    def embed(self, ids: Int[Array, "batch pos"], frame: Frame, tap: Tap, state: State) -> tuple[Stream, State]:
        """Embed tokens.

        Args:
            ids: token ids.
            frame: their positions.
            tap: what to call at the sites before the layers.
            state: the tap's state.

        Returns:
            `[batch, pos, d_model]`, the residual stream before the first layer; and the tap's state.
        """

    @abc.abstractmethod
    def walk(
        self, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None, **how: Any
    ) -> tuple[Any, Any]:
        """Run a function on the layers in turn: see `mijax.model.walk.walk`.

        Args:
            body: `body(layer, carry, x) -> carry, y`.
            carry: what the first layer's call receives.
            xs: arrays with a leading layer axis, of which each call receives one entry.
            **how: `first`, `last`, `remat` and `group`.

        Returns:
            The last carry, and the `y` stacked over layers.
        """

    @abc.abstractmethod
    def layer(self, index: int) -> Callable[..., tuple[Asked, State]]:
        """One layer, as `walk` passes it to its body.

        Args:
            index: the number of the layer.

        Returns:
            A callable like `mijax.model.walk.Layer`.
        """

    @abc.abstractmethod
    def final(self, x: Stream, frame: Frame, tap: Tap, state: State) -> tuple[Stream, State]:
        """Apply the last norm.

        Args:
            x: `[batch, pos, d_model]`, the residual stream after the last layer.
            frame: the positions of its tokens.
            tap: what to call at the sites after the layers.
            state: the tap's state.

        Returns:
            `[batch, pos, d_model]`, the stream as the unembedding reads it; and the tap's state.
        """

    @abc.abstractmethod
    def readout(self, final: Stream, tokens: Tokens) -> Readout:
        """Put the final stream together with the unembedding.

        Args:
            final: `[batch, pos, d_model]`, as `final` returns it.
            tokens: the batch.

        Returns:
            The readout, which computes logits.
        """

    @property
    @abc.abstractmethod
    def layer_bytes(self) -> int:
        """The size of the parameters of one layer, in bytes."""

    @property
    @abc.abstractmethod
    def d_vocab(self) -> int:
        """The size of the vocabulary."""

    @property
    @abc.abstractmethod
    def n_ctx(self) -> int:
        """The greatest number of tokens of a prompt."""

    def inputs(self, values: Any) -> Tokens:
        """Prompts as `Tokens`: returned unchanged, or made of plain ids, all of which are real tokens."""
        return as_tokens(values)

    def forward(self, inputs: Any, frame: Frame, tap: Tap, state: State) -> tuple[Readout, State]:
        """Embed the tokens, run all layers, and apply the last norm."""
        x, state = self.embed(jnp.asarray(inputs.ids), frame, tap, state)
        step = lambda layer, carry, _: (layer(carry[0], frame, tap, carry[1]), None)
        (x, state), _ = self.walk(step, (x, state))
        x, state = self.final(x, frame, tap, state)
        return self.readout(x, inputs), state

    def output_like(self, inputs: Any, **keywords: Any) -> Readout:
        """A readout with a shape in place of the final stream."""
        shape = self.sites["final_in"].shape(*inputs.ids.shape)
        empty = self.readout(jax.device_put(np.zeros(shape, self.dtype)), inputs)  # device_put compiles nothing
        return eqx.tree_at(lambda out: out.final, empty, jax.ShapeDtypeStruct(shape, self.dtype, **keywords))
