"""Generation under interventions, with cached keys and values."""
