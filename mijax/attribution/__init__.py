"""Gradients as estimates of what patching would do."""
