"""mijax: mechanistic interpretability in JAX, the forward pass as a pure function of data."""

from mijax.interventions.edits import Add, Edit, Interchange, Mix, Project, Replace, Scale
from mijax.interventions.where import Where
from mijax.model.config import Config, RotaryScaling
from mijax.model.readout import Readout
from mijax.model.sites import SITES, sites
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer, init
from mijax.run import Out, run

__all__ = [
    "SITES", "Add", "Config", "Edit", "Interchange", "Mix", "Out", "Project", "Readout", "Replace",
    "RotaryScaling", "Scale", "Tokens", "Transformer", "Where", "init", "run", "sites",
]  # fmt: skip
