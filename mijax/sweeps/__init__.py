"""Grids of edits, run and measured."""
