"""Direct and indirect effects of an input through a mediator (Pearl 2001; Vig et al. 2020)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from mijax._types import ArrayLike
from mijax.engine.grid import Grid
from mijax.engine.options import Running
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.tokens import Inputs
from mijax.sweeps.patch import patch

if TYPE_CHECKING:
    import xarray as xr


def mediate(
    model: Model,
    *,
    base: Inputs | ArrayLike,
    source: Inputs | ArrayLike,
    site: str,
    over: Sequence[str] | Grid,
    metric: AnyMetric,
    **running: Unpack[Running],
) -> "xr.Dataset":
    """The effect of changing the input from `base` to `source`, and how much of it goes through each mediator.

    With Y(input, mediator): the `total` effect is Y(source, source) - Y(base, base), of every prompt. The natural
    `indirect` effect Y(base, source) - Y(base, base) is that of putting the source's activations into the base run.
    The natural `direct` effect Y(source, base) - Y(base, base) is that of the new input with the mediator held at
    its old value. On a linear model total = direct + indirect.

    Args:
        model: the model.
        base: the prompts before the change.
        source: the prompts after it, of the same shape and padding.
        site: name of the site.
        over: axes of the site, each taken in full, or a `mijax.grid`, as in `patch`; the mediators are its cells.
        metric: the metric Y, one alone.
        running: `memory`, `progress`, `save` and `mesh`, as in `sweep`. In the folder `save`, the indirect and the
            direct effects have folders of their own.

    Returns:
        The variables `total`, `direct` and `indirect`; the metric on both inputs is beside them in the coordinates
        `metric_base` and `metric_source`.

    Raises:
        ValueError: what `patch` raises.
        TypeError: for several metrics by name, and what `patch` raises.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> r = mj.mediate(model, base=[[1, 2, 3]], source=[[1, 4, 3]], site="z", over=("layer", "head"), metric=mj.metrics.logit(7))
    >>> dict(r.sizes), list(r.data_vars)
    ({'batch': 1, 'layer': 2, 'head': 2}, ['total', 'direct', 'indirect'])
    """
    import xarray as xr

    if isinstance(metric, Mapping):
        raise TypeError(f"effects are those of one metric, given {len(metric)} by name: call mediate with each alone")
    shared: dict[str, Any] = {"site": site, "over": over, "metric": metric, **running}
    save = running.get("save")
    folder = lambda name: shared if save is None else {**shared, "save": f"{save}/{name}"}
    into_base = patch(model, clean=source, corrupted=base, direction="denoise", **folder("indirect"))
    into_source = patch(model, clean=source, corrupted=base, direction="noise", **folder("direct"))
    at_base, at_source = into_base.base, into_base.source
    effects = {"total": at_source - at_base, "direct": into_source - at_base, "indirect": into_base - at_base}
    effects = {name: effect.drop_vars(["base", "source"], errors="ignore") for name, effect in effects.items()}
    result = xr.Dataset(effects, attrs={**into_base.attrs, "direction": "base to source"})
    metric_coords = {
        f"metric_{side}": value.reset_coords(drop=True) for side, value in (("base", at_base), ("source", at_source))
    }
    return result.assign_coords(metric_coords)
