"""What sweeps and other methods share: grids, cells, the plan of a sweep and its execution, labels, statistics.

`grid` and `cells` say what is asked; `layout` and `plan` decide on the host what each cell need compute, within memory; `chunk` runs cells on the
device, `driver` all chunks, `examples` prompts in groups; `pairs` patches between two runs; `measure` metrics, `per_example` those of a part of the prompts; `labels`, `names`, `axes`, `statistics`, `options`.
"""
