"""How much arithmetic a patching grid takes: done naively, and at least.

Floating-point operations of matrix products (a multiply-add is two), for prompts whose metric reads two logits at the
last position. Norms, activations and softmax are not counted.
"""

from typing import Literal, TypeAlias

import numpy as np

from mijax import Config

GridName: TypeAlias = Literal["resid_pre", "z_head", "z_head_pos", "qkvzp", "attribution"]
PARTS: dict[GridName, tuple[tuple[str, bool], ...]] = {
    "resid_pre": (("resid_pre", True),),
    "z_head": (("z", False),),
    "z_head_pos": (("z", True),),
    "qkvzp": (("q", False), ("k", False), ("v", False), ("z", False), ("pattern", False)),
}
"""The sites of each grid, and whether each position is a cell of its own or all are patched at once."""


ATTRIBUTED = ("resid_pre", "mlp_out", "attn_out", "z", "q", "k", "v", "pattern")
"""The sites of attribution patching: every position and head, and every query and key, is a cell."""


def heads_of(c: Config, site: str) -> int:
    """How many heads a site has: 1 where it has none."""
    return {"resid_pre": 1, "mlp_out": 1, "attn_out": 1, "k": c.n_kv_heads, "v": c.n_kv_heads}.get(site, c.n_heads)


def cells(c: Config, grid: GridName, pos: int) -> int:
    """How many cells a grid has."""
    if grid == "attribution":
        return sum(c.n_layers * heads_of(c, site) * pos ** (1 + (site == "pattern")) for site in ATTRIBUTED)
    return sum(c.n_layers * heads_of(c, site) * (pos if by_pos else 1) for site, by_pos in PARTS[grid])


def naive(c: Config, grid: GridName, batch: int, pos: int) -> int:
    """Every cell a whole forward pass: all scores, masked or not, and all logits. Attribution is two, and one backward,
    which without parameters' gradients takes as much."""
    attention = 2 * pos * c.n_heads * c.d_head
    runs = 3 if grid == "attribution" else cells(c, grid, pos)
    token = c.n_layers * (_queries(c) + _keys_values(c) + _mlp(c) + attention) + c.d_model * c.d_vocab
    return 2 * runs * batch * pos * token


def floor(c: Config, grid: GridName, differs: np.ndarray) -> int:
    """Only what must be recomputed, beside one clean and one corrupted run.

    `differs [batch pos]` says where clean and corrupted tokens differ: a cell that puts in what stands there already
    takes nothing. Other cells take, from the edited position on: of the edited layer everything (resid_pre), or at the
    edited positions what follows the edit of one head: its scores, what they gather, its part of W_O, and the MLP; then
    every later layer, of the last one only keys and values there, and the rest at the position that is read; and two
    columns of the unembedding. Attribution is three runs of everything, the last layer likewise.
    """
    if grid == "attribution":
        return 2 * 3 * len(differs) * _layers(c, 0, 0, differs.shape[1])
    total = 0
    for site, by_pos in PARTS[grid]:
        for row in np.asarray(differs, bool):
            total += heads_of(c, site) * _example(c, site, by_pos, row)
    return 2 * total


def _example(c: Config, site: str, by_pos: bool, differs: np.ndarray) -> int:
    """Multiply-adds for one example of all cells of a site, for one head."""
    pos, total = len(differs), 0
    if not differs.any():
        return 0
    first = int(np.argmax(differs))
    for layer in range(c.n_layers):
        for begin in range(first, pos) if by_pos else (first,):
            if site != "resid_pre":
                total += _head_cell(c, site, layer, begin, [begin] if by_pos else range(begin, pos), pos)
            elif layer or differs[begin]:
                total += _layers(c, layer, begin, pos)
    return total


def _head_cell(c: Config, site: str, layer: int, begin: int, edited, pos: int) -> int:
    """One head patched at the positions `edited`, from `begin` on."""
    last = layer == c.n_layers - 1
    seen = [i + 1 for i in edited if not last or i == pos - 1]  # how many keys each recomputed query has
    heads = c.n_heads // heads_of(c, site)  # that read an edited key or value
    products = {"q": 2, "k": 2, "v": 1, "pattern": 1, "z": 0}[site]
    cost = len(seen) * (heads * c.d_head * c.d_model + _mlp(c)) + products * heads * c.d_head * sum(seen)
    if last:
        return cost + 2 * c.d_model * len(seen)
    return cost + _layers(c, layer + 1, begin, pos)


def _layers(c: Config, layer: int, begin: int, pos: int) -> int:
    """All layers from `layer` on at the positions from `begin` on, down to the two logits."""
    count, width = pos - begin, 2 * c.n_heads * c.d_head
    seen = sum(range(begin + 1, pos + 1))
    whole = count * (_queries(c) + _keys_values(c) + _mlp(c)) + width * seen
    last = count * _keys_values(c) + _queries(c) + _mlp(c) + width * pos
    return (c.n_layers - 1 - layer) * whole + last + 2 * c.d_model


def _queries(c: Config) -> int:
    """W_Q and W_O for one token."""
    return 2 * c.d_model * c.n_heads * c.d_head


def _keys_values(c: Config) -> int:
    return 2 * c.d_model * c.n_kv_heads * c.d_head


def _mlp(c: Config) -> int:
    return (3 if c.mlp == "gated" else 2) * c.d_model * c.d_mlp
