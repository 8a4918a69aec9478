"""Users' functions as programs: what a Python function computes at the time of the call, as data.

`convert` is the one door; `key` compares programs by structure, `hoist` makes the arrays that they read arguments, `now` compiles functions that call
users' taps and models.
"""
