"""Interventions as data: where they act, what they do, and the taps that apply them."""
