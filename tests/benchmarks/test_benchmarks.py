"""What the benchmark of sweeps counts, and that it runs."""

from typing import Any

import numpy as np
import pytest

import mijax as mj
from benchmarks import arithmetic, sweeps

GPT2 = mj.Config(n_layers=12, d_model=768, n_heads=12, d_vocab=50257, n_ctx=1024)


@pytest.mark.parametrize(
    ("grid", "cells", "naive", "floor"),
    [("resid_pre", 192, 6086, 1068), ("z_head", 144, 4565, 1414), ("z_head_pos", 2304, 73036, 10900)],
)
def test_arithmetic_of_gpt2_small(grid, cells, naive, floor):
    assert arithmetic.cells(GPT2, grid, 16) == cells
    assert arithmetic.naive(GPT2, grid, 8, 16) / 1e9 == pytest.approx(naive, rel=1e-3)
    assert arithmetic.floor(GPT2, grid, np.ones((8, 16), bool)) / 1e9 == pytest.approx(floor, rel=2e-3)


def test_what_changes_nothing_takes_no_arithmetic():
    every = np.ones((1, 6), bool)
    late = every & (np.arange(6) >= 4)
    for grid in arithmetic.PARTS:
        assert arithmetic.floor(GPT2, grid, ~every) == 0
        assert arithmetic.floor(GPT2, grid, late) < arithmetic.floor(GPT2, grid, every)
        twice = np.concatenate([late, late])
        assert arithmetic.floor(GPT2, grid, twice) == 2 * arithmetic.floor(GPT2, grid, late)


def test_grouped_queries_and_gates_are_counted():
    config = mj.Config(n_layers=1, d_model=8, n_heads=4, n_kv_heads=2, d_mlp=5, d_vocab=11, n_ctx=8, positions=mj.Rotary(), mlp="gated")  # fmt: skip
    mlp, projections, attention, unembedding = 3 * 8 * 5, 2 * 8 * 8 + 2 * 8 * 4, 2 * 3 * 8, 8 * 11
    assert arithmetic.naive(config, "z_head", 1, 3) == 2 * 4 * 3 * (mlp + projections + attention + unembedding)
    head = 2 * 8 + mlp + 2 * 8  # its part of W_O, the MLP, two logits, at one position
    assert arithmetic.floor(config, "z_head", np.ones((1, 3), bool)) == 2 * 4 * head


def test_extrapolation_counts_the_clean_run_once():
    answer = {"cells": 10, "wall": 3.0, "clean": 1.0, "cpu": 6.0, "clean_cpu": 2.0}
    whole = sweeps.extrapolated(answer, 40)
    assert (whole["wall"], whole["cpu"]) == (9.0, 18.0)


def test_the_benchmark_runs_and_compares(tmp_path, monkeypatch):
    settings = sweeps.Settings(grids=("resid_pre",), rounds=1, cold_rounds=0, tiny=True, out=tmp_path / "out.json")
    record = sweeps.main(settings)
    assert record["grids"]["resid_pre"]["cells"] == 10 and settings.out.exists()
    beside: Any = None
    bench = sweeps.Bench(settings, GPT2, np.ones((1, 1)), tmp_path, (), beside)
    with pytest.raises(RuntimeError, match="differs from mijax"):
        bench.checked("a peer", "resid_pre", np.array([[1.0, 2.0]]), np.array([[1.0, 2.001]]))
    with pytest.raises(SystemExit, match="is no executable"):
        sweeps.peer_commands(str(tmp_path / "python"), attribution=True)


def test_long_prompts_are_timed_with_and_without_all_scores():
    """Where PyTorch is, transformers too, whose logits must be the same."""
    from benchmarks import long_prompts

    row = long_prompts.main(lengths=(600,), rounds=1, tiny=True)[600]
    assert row["difference"] < 1e-4 and row["planned"] < 0.6 * row["planned_whole"]


def test_experts_are_timed_beside_a_dense_mlp():
    from benchmarks import experts

    record = experts.main(experts=4, top_k=2, d_model=16, d_mlp=8, prompts=1, tokens=12, rounds=1)
    assert record["difference"] < 1e-5 and {"used", "every", "dense"} <= {*record}


def test_architectures_are_judged_by_their_bounds(capsys):
    """Generation with new vectors compiles nothing, whatever the machine; times of toys say nothing."""
    from benchmarks import architectures

    figures = {figure.name: figure for figure in architectures.main(rounds=2, tiny=True)}
    assert all(f.value == 0 for name, f in figures.items() if "compiled for new vectors" in name)
    assert "largest error" in capsys.readouterr().out and len(figures) == 11
