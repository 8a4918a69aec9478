"""How mijax's values are shown in notebooks: as trees that unfold, by treescope, without a network."""

from typing import Any

import equinox as eqx


class ShownAsTree(eqx.Module):
    """A pytree that a notebook shows with its arrays' shapes and statistics."""

    def _repr_html_(self) -> str:
        return as_html(self)


def as_html(value: Any) -> str:
    """A value as an HTML tree that unfolds.

    Args:
        value: any value.

    Returns:
        A self-contained piece of a page.
    """
    import treescope  # here, since most processes show nothing

    return treescope.render_to_html(value)
