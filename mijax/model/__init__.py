"""The transformer: configuration, parameters, and one block that every kind of run calls."""
