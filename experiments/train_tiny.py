"""A small attention-only transformer learns to repeat: induction heads (Olsson et al. 2022).

Sequences of random tokens repeat with a period that differs from one to the next, so that no fixed offset predicts
them: the model must find where the current token stood before, and copy what came after it. That takes two layers (a
head that looks one token back, and one that uses it); one layer can do little better than guess.

    python -m experiments.train_tiny              # two layers
    python -m experiments.train_tiny --layers 1   # the control

The same command continues a run that was stopped, and ends in the same parameters to the bit.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import tyro
from tqdm import tqdm

import mijax as mj
from mijax import plots
from mijax.files import atomic


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train an attention-only transformer on repeated random sequences."""

    layers: int = 2
    """How many layers; 1 is the control."""
    d_model: int = 64
    heads: int = 4
    vocab: int = 128
    length: int = 80
    """Tokens of a sequence."""
    shortest_period: int = 16
    longest_period: int = 47
    batch: int = 64
    steps: int = 1000
    learning_rate: float = 3e-3
    save_every: int = 100
    """Steps between checkpoints, and between lines of the log."""
    seed: int = 0
    out: Path = Path("results/train_tiny")
    """Each number of layers has a folder of its own in here."""


def config(settings: Settings) -> mj.Config:
    """Attention only, with rotary positions."""
    return mj.Config(
        n_layers=settings.layers,
        d_model=settings.d_model,
        n_heads=settings.heads,
        d_vocab=settings.vocab,
        n_ctx=settings.length,
        positions=mj.Rotary(),
        mlp="none",
        tied_unembed=False,
    )


def sequences(settings: Settings, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token ids `[batch, pos]`, and the period `[batch]` with which each sequence repeats."""
    of_tokens, of_period = jax.random.split(key)
    tokens = jax.random.randint(of_tokens, (settings.batch, settings.longest_period), 0, settings.vocab)
    period = jax.random.randint(of_period, (settings.batch,), settings.shortest_period, settings.longest_period + 1)
    place = jnp.arange(settings.length)[None] % period[:, None]
    return jnp.take_along_axis(tokens, place, axis=1), period


def loss(model: mj.Transformer, ids: jax.Array) -> jax.Array:
    """The mean next-token loss in nats (padding, of which there is none here, would not count)."""
    tokens = mj.Tokens(ids)
    return jnp.mean(mj.metrics.cross_entropy(tokens)(mj.run(model, tokens)))


def induction_accuracy(model: mj.Transformer, settings: Settings, key: jax.Array) -> jax.Array:
    """How often the likeliest token is right, where the sequence has begun to repeat."""
    ids, period = sequences(settings, key)
    right = jnp.argmax(mj.run(model, ids).logits[:, :-1], axis=-1) == ids[:, 1:]
    repeats = jnp.arange(settings.length - 1)[None] >= period[:, None]
    return jnp.sum(right & repeats) / jnp.sum(repeats)


def optimiser(settings: Settings) -> optax.GradientTransformation:
    """Adam with a short warm-up and a cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, min(100, settings.steps // 10), settings.steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@eqx.filter_jit
def train(state: Any, start: jax.Array, settings: Settings, count: int) -> tuple[Any, jax.Array, jax.Array]:
    """`count` steps from `start`; gives the new state, the loss of each step, and the accuracy after them.

    Every step draws its data from its own number, so that a run may stop and go on anywhere.
    """
    root = jax.random.key(settings.seed)

    def step(state, number):
        model, moments = state
        value, gradient = jax.value_and_grad(loss)(model, sequences(settings, jax.random.fold_in(root, number))[0])
        updates, moments = optimiser(settings).update(gradient, moments)
        return (eqx.apply_updates(model, updates), moments), value

    state, losses = jax.lax.scan(step, state, start + jnp.arange(count))
    held_out = jax.random.fold_in(root, 2**31)  # no step has this number
    return state, losses, induction_accuracy(state[0], settings, held_out)


def main(settings: Settings) -> tuple[mj.Transformer, list[dict]]:
    """Train, or go on training, and write log, figure, checkpoints and the model."""
    mj.compilation_cache()
    if settings.steps % settings.save_every:
        raise SystemExit(f"--steps {settings.steps} must be a multiple of --save-every {settings.save_every}")
    out = (settings.out / f"{settings.layers}_layers").absolute()
    model = mj.init(config(settings), jax.random.key(settings.seed))
    state = (model, optimiser(settings).init(eqx.filter(model, eqx.is_array)))
    _begin(out, settings)
    log = _read_log(out / "log.jsonl")
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(out / "checkpoints", options=options) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            leaves, shape = jax.tree.flatten(state)
            state = jax.tree.unflatten(shape, checkpoints.restore(done, args=ocp.args.StandardRestore(leaves)))
            print(f"going on from step {done} of {settings.steps}")
        log = [line for line in log if line["step"] <= done]
        with tqdm(total=settings.steps, initial=done, unit="step", delay=1.0, leave=False) as bar:
            while done < settings.steps:
                state, losses, accuracy = train(state, jnp.asarray(done), settings, settings.save_every)
                done += settings.save_every
                log.append(
                    {
                        "step": done,
                        "loss": float(losses[-1]),
                        "mean_loss": float(jnp.mean(losses)),
                        "accuracy": float(accuracy),
                    }
                )
                if not jnp.isfinite(losses).all():
                    raise SystemExit(
                        f"the loss is not finite from step {done - settings.save_every + int(jnp.argmin(jnp.isfinite(losses)))} on"
                    )
                _write_log(out / "log.jsonl", log)
                checkpoints.save(done, args=ocp.args.StandardSave(jax.tree.leaves(state)))
                checkpoints.wait_until_finished()
                bar.update(settings.save_every)
                bar.set_postfix(loss=f"{log[-1]['mean_loss']:.3f}", accuracy=f"{log[-1]['accuracy']:.1%}")
    _figure(settings, log, out / "training.png")
    last = log[-1]
    print(f"{settings.layers} layer(s), {settings.steps} steps: loss {last['mean_loss']:.3f} nats, induction accuracy {last['accuracy']:.1%}"
          f" (chance {1 / settings.vocab:.1%}); wrote {out}")  # fmt: skip
    return state[0], log


def _begin(out: Path, settings: Settings) -> None:
    """Write the settings, or refuse a folder that was begun with others."""
    fields = {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"}
    file = out / "settings.json"
    if file.exists() and json.loads(file.read_text()) != fields:
        raise SystemExit(f"{out} was begun with other settings ({file}); give another --out, or remove it")
    with atomic(file) as scratch:
        scratch.write_text(json.dumps(fields, indent=2))


def _read_log(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _write_log(file: Path, log: list[dict]) -> None:
    with atomic(file) as scratch:
        scratch.write_text("".join(json.dumps(line) + "\n" for line in log))


def _figure(settings: Settings, log: list[dict], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in log]
    left.plot(steps, [line["mean_loss"] for line in log])
    left.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    right.plot(steps, [line["accuracy"] for line in log])
    right.axhline(1 / settings.vocab, color="grey", linestyle=":", label="chance")
    right.set(xlabel="step", ylabel="induction accuracy", ylim=(0, 1))
    right.legend()
    figure.suptitle(f"{settings.layers} attention layer(s) on repeated random sequences")
    plots.save(figure, file)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
