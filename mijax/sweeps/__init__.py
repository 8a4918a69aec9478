"""Sweeps: grids of edits, run and measured."""
