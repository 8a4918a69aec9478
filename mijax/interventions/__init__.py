"""Interventions as data: where they act, what they do, and the taps that apply them.

`where` is read by `selecting` (inside a run) and `places` (on the host); `edits` with their `operands`; the taps `editing`, `capturing`, and `rows`
(both for packed rows of many cells); `functions` converts users' edits.
"""
