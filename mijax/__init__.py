"""mijax: mechanistic interpretability in JAX, the forward pass as a pure function of data.

Begin with `load` or `init`, `run`, `patch`, `sweep`, `ablate`, `attribute`, `generate`. The code, from the ground up (a package imports
from those before it):

    rules           what the keys of files may hold
    display, cache, files, memory, meshes   values in notebooks; folders; bytes; arrays on explicit meshes
    programs        users' functions as programs, traced at each call and compared by structure
    chunks          many small jobs: progress, saved and resumed, over devices, within memory
    model           configuration, the table of sites, taps, positions, norm, attention, MLP, the one block and the one walk over
                    layers; `model.model` is the protocol of what is run
    superposition   toy models of superposition: data, models, losses, a trainer, theory, geometry
    checkpoints     Hugging Face folders, the hub, GGUF, the bundled model; tokenizer and chat template
    interventions   where, edits and their operands, and the taps that edit and capture
    forward         `run`: what is above reaches the model through it, or through the same walk
    metrics, generation
    engine          what families of methods share: grids, cells, the plan of a sweep and what runs it, labels, statistics
    sweeps          sweep, patching, ablation, knockout, mediation, causal tracing, the strongest cells
    attribution     gradients: AtP, AtP*, integrated gradients; their own error; concepts
    plots           results to figures
"""

import importlib.metadata

from mijax import metrics, plots, superposition
from mijax.attribution.atp import AtP
from mijax.attribution.atp_star import AtPStar
from mijax.attribution.attribute import attribute
from mijax.attribution.concepts import concept
from mijax.attribution.gradients import Gradients, gradients
from mijax.attribution.integrated import IntegratedGradients
from mijax.attribution.verify import Verify
from mijax.cache import compilation_cache
from mijax.checkpoints.chat_process import ChatTemplateError
from mijax.checkpoints.load import load
from mijax.checkpoints.save import save
from mijax.checkpoints.tokenizer import Tokenizer
from mijax.checkpoints.transformer_lens import from_transformer_lens, to_transformer_lens
from mijax.engine.cells import Stack, stack
from mijax.engine.grid import Grid, grid
from mijax.engine.statistics import bootstrap, normalise, sign_flips
from mijax.forward import Out, run
from mijax.generation.generate import Generated, generate
from mijax.generation.masks import current_tokens, new_tokens, prompt_tokens
from mijax.interventions.edits import Add, Apply, Edit, Interchange, Mix, Project, Replace, Scale
from mijax.interventions.where import Where
from mijax.model import processing
from mijax.model.config import Config
from mijax.model.model import LayeredModel, Model
from mijax.model.readout import Readout
from mijax.model.rotary import Rotary, RotaryScaling
from mijax.model.routing import Experts
from mijax.model.sites import SITES, Site, sites
from mijax.model.tap import Point, Tap, Visit, called
from mijax.model.tokens import Inputs, Tokens
from mijax.model.transformer import Transformer, init
from mijax.model.wrapper import Wrapper
from mijax.sweeps.ablate import ablate, dose_response
from mijax.sweeps.knock_out import knock_out
from mijax.sweeps.mediate import mediate
from mijax.sweeps.patch import patch
from mijax.sweeps.strongest import strongest
from mijax.sweeps.sweep import sweep
from mijax.sweeps.trace import trace

__version__ = importlib.metadata.version("mijax")

__all__ = [
    "SITES",
    "Add",
    "Apply",
    "AtP",
    "AtPStar",
    "ChatTemplateError",
    "Config",
    "Edit",
    "Experts",
    "Generated",
    "Gradients",
    "Grid",
    "Inputs",
    "IntegratedGradients",
    "Interchange",
    "LayeredModel",
    "Mix",
    "Model",
    "Out",
    "Point",
    "Project",
    "Readout",
    "Replace",
    "Rotary",
    "RotaryScaling",
    "Scale",
    "Site",
    "Stack",
    "Tap",
    "Tokenizer",
    "Tokens",
    "Transformer",
    "Verify",
    "Visit",
    "Where",
    "Wrapper",
    "ablate",
    "attribute",
    "bootstrap",
    "called",
    "compilation_cache",
    "concept",
    "current_tokens",
    "dose_response",
    "from_transformer_lens",
    "generate",
    "gradients",
    "grid",
    "init",
    "knock_out",
    "load",
    "mediate",
    "metrics",
    "new_tokens",
    "normalise",
    "patch",
    "plots",
    "processing",
    "prompt_tokens",
    "run",
    "save",
    "sign_flips",
    "sites",
    "stack",
    "strongest",
    "superposition",
    "sweep",
    "to_transformer_lens",
    "trace",
]
