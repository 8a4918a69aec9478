"""The engine of sweeps and other methods: grids, cells, the plan of a sweep and its execution, labels, statistics."""
