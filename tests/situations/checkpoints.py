"""Checkpoints with stored outputs of transformers, to be rearranged as users met them."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import mijax as mj
from tests.reference.tiny_models import STORED, inputs


def copy(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(STORED / name, tmp_path / "model", dirs_exist_ok=True))


def set_config(folder: Path, remove: tuple[str, ...] = (), **entries) -> Path:
    path = folder / "config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps(kept | entries))
    return folder


def set_tensors(folder: Path, change) -> Path:
    """`change` maps all tensors to new ones."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: np.array(v, order="C") for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def logits(model: mj.Transformer) -> np.ndarray:
    return np.asarray(mj.run(model, mj.Tokens(inputs("none")[0])).logits)


def stored_logits(name: str) -> np.ndarray:
    """What transformers gave."""
    return np.load(STORED / name / "outputs.npz")["logits_none"]
