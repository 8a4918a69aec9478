"""What sweeps and other families of methods run on: grids, cells, the plan of a sweep and what runs it, labels, statistics."""
