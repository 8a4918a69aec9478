"""mijax: mechanistic interpretability in JAX, the forward pass as a pure function of data."""

from mijax import metrics
from mijax.checkpoints.load import load
from mijax.checkpoints.save import save
from mijax.checkpoints.tokenizer import Tokenizer
from mijax.generate import Generated, generate, new_tokens
from mijax.interventions.edits import Add, Edit, Interchange, Mix, Project, Replace, Scale
from mijax.interventions.where import Where
from mijax.model import processing
from mijax.model.config import Config, RotaryScaling
from mijax.model.readout import Readout
from mijax.model.sites import SITES, sites
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer, init
from mijax.run import Out, run
from mijax.sweeps.cells import Stack, stack
from mijax.sweeps.grid import Grid, grid
from mijax.sweeps.patch import patch
from mijax.sweeps.statistics import bootstrap, normalise
from mijax.sweeps.sweep import sweep

__all__ = [
    "SITES", "Add", "Config", "Edit", "Generated", "Grid", "Interchange", "Mix", "Out", "Project", "Readout", "Replace",
    "RotaryScaling", "Scale", "Stack", "Tokenizer", "Tokens", "Transformer", "Where", "bootstrap", "generate", "grid", "init", "load",
    "metrics", "new_tokens", "normalise", "patch", "processing", "run", "save", "sites", "stack", "sweep",
]  # fmt: skip
