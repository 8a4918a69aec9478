"""The superposition laboratory: toy models, thousands at a time, with their theory and geometry."""

from mijax.superposition import bounds, geometry, kgons, theory
from mijax.superposition.data import Data, Patterns, anticorrelated, correlated, fixed, one_hot, sparse, unit_norm
from mijax.superposition.loss import Toy, loss, loss_by_active, population_loss
from mijax.superposition.model import (
    Model,
    gelu_output,
    hidden_layer,
    linear,
    relu_hidden,
    relu_output,
    times,
    top_k_output,
    untied,
)
from mijax.superposition.select import best, best_of
from mijax.superposition.train import train

__all__ = [
    "Data",
    "Model",
    "Patterns",
    "Toy",
    "anticorrelated",
    "best",
    "best_of",
    "bounds",
    "correlated",
    "fixed",
    "gelu_output",
    "geometry",
    "hidden_layer",
    "kgons",
    "linear",
    "loss",
    "loss_by_active",
    "one_hot",
    "population_loss",
    "relu_hidden",
    "relu_output",
    "sparse",
    "theory",
    "times",
    "top_k_output",
    "train",
    "unit_norm",
    "untied",
]
