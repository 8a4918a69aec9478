"""Users' functions as programs: what a Python function computes at the time of the call, as data."""
