"""Users' functions as programs: what a Python function computes now, as data."""
