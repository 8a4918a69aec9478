"""The transformer: configuration, parameters, and the one block that every kind of run calls."""
