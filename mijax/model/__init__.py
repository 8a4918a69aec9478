"""The transformer: configuration, parameters, and the one block that every kind of run calls.

`model` is the protocol of what is run, `transformer` implements it; `config` with `rotary`, `routing` and `fields`, `sites` (the
table, each fact a field), `tap`, `position` (which tokens a run computes, and how they find keys), `norm`, `scores`, `attention`,
`mlp`, `experts`, `block`, `walk` (the one loop over layers), `readout`, `tokens`, `processing`.
"""
