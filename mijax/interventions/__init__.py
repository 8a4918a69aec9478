"""Interventions as data: where, what, and the tap that applies them."""
