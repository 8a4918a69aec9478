"""Gradients as estimates of what patching would do.

`attribute` is the driver; `nodes` (cells as gates), `side_by_side` and `taps` (the gated run beside the source run) and `estimates`
(prompts in chunks within memory) make a method's terms; one method a file: `atp`, `integrated`, `atp_star` with
`recompute`; `curvature` and `verify` tell the error; `checks` come first; `gradients` are those of a metric
with respect to activations; `concepts` compares directions, one of them that of a linear `probe`.
"""
