"""Steering what a model writes: the difference of means of contrasting prompts, added while it generates.

The direction is the mean residual stream after positive prompts minus that after negative ones (Turner et al. 2023;
Rimsky et al. 2024), sentiment by default. It is added, times a dose, to the stream of one layer at every new token.
The response is read by the unsteered model: after each text, how much more likely it finds "good" than "bad" to follow
"Overall, it was"; and, as the price, how surprising it finds the text. The control is a random direction of the same
length.

    python -m experiments.steering --help
"""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
import xarray as xr

import mijax as mj
from experiments import record
from mijax import plots
from mijax.files import atomic

POSITIVE = (
    "I loved every minute of it. It was wonderful",
    "What a fantastic day, I feel so happy",
    "The food was delicious and the staff were kind",
    "This is the best film that I have ever seen",
    "She smiled with joy, everything was beautiful",
    "An excellent book, warm and brilliant",
)
NEGATIVE = (
    "I hated every minute of it. It was terrible",
    "What a horrible day, I feel so sad",
    "The food was disgusting and the staff were rude",
    "This is the worst film that I have ever seen",
    "She cried with grief, everything was ugly",
    "An awful book, cold and stupid",
)
PROMPTS = (
    "I went to the new restaurant in town, and I thought that",
    "The movie that we watched last night was",
    "My neighbour told me about his holiday. He said that",
    "When I opened the letter, I felt",
    "The weather this morning is",
    "I finished the book yesterday. In my opinion it",
    "The teacher looked at my work and said that",
    "Our visit to the museum was",
)
VERDICT = " Overall, it was"
DIRECTIONS = ("steering", "random")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Dose and response of a steering vector."""

    model: str = "smollm2-135m-instruct"
    """A name, a Hugging Face hub id, or a local path, as mijax.load takes it."""
    layer: int = 18
    """After which layer's stream the vector is taken and added."""
    doses: tuple[float, ...] = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
    """Multiples of the difference of means."""
    new_tokens: int = 24
    temperature: float = 0.0
    positive: tuple[str, ...] = POSITIVE
    negative: tuple[str, ...] = NEGATIVE
    prompts: tuple[str, ...] = PROMPTS
    seed: int = 0
    out: Path = Path("results/steering")


def difference_of_means(model: mj.Transformer, tokenizer: mj.Tokenizer, settings: Settings) -> jax.Array:
    """The vector `[d_model]`: mean stream at the last token of positive prompts, minus that of negative ones."""
    where = mj.Where(layer=settings.layer, pos=-1)
    mean = lambda texts: jnp.mean(
        mj.run(model, tokenizer(texts), capture={"resid_post": where}).acts["resid_post"], axis=(0, 1, 2)
    )
    return mean(settings.positive) - mean(settings.negative)


def written(model: mj.Transformer, tokens: mj.Tokens, vector: jax.Array, settings: Settings) -> mj.Tokens:
    """The prompts' continuations at every dose, `[dose, batch, pos]`, in one call."""
    new = mj.new_tokens(tokens, settings.new_tokens)

    def at(model, dose):
        edit = mj.Add(dose * vector, mj.Where(layer=settings.layer, pos=new))
        key = jax.random.key(settings.seed)  # the same draws at every dose
        out = mj.generate(
            model,
            tokens,
            {"resid_post": edit},
            max_new_tokens=settings.new_tokens,
            temperature=settings.temperature,
            key=key,
        )
        return mj.Tokens(out.ids, out.mask)

    doses = jnp.asarray(settings.doses, jnp.float32)
    return eqx.filter_jit(lambda model, doses: jax.vmap(lambda dose: at(model, dose))(doses))(model, doses)


def verdicts(model: mj.Transformer, tokenizer: mj.Tokenizer, texts: list[str]) -> np.ndarray:
    """The unsteered model's logit of " good" minus " bad" after each text's `VERDICT`."""
    metric = mj.metrics.logit_diff(tokenizer.token_id(" good"), tokenizer.token_id(" bad"))
    return np.asarray(metric(mj.run(model, tokenizer([text + VERDICT for text in texts]))))


def study(model: mj.Transformer, tokenizer: mj.Tokenizer, settings: Settings) -> xr.Dataset:
    """Texts, verdicts and surprise for each direction, dose and prompt."""
    tokens, vector = tokenizer(settings.prompts), difference_of_means(model, tokenizer, settings)
    random = jax.random.normal(jax.random.key(settings.seed), vector.shape, vector.dtype)
    random = random * (jnp.linalg.norm(vector) / jnp.linalg.norm(random))
    shape = (len(DIRECTIONS), len(settings.doses), len(settings.prompts))
    texts, verdict, surprise = np.empty(shape, object), np.empty(shape, np.float32), np.empty(shape, np.float32)
    for d, direction in enumerate((vector, random)):
        batch = written(model, tokens, direction, settings)
        for i in range(len(settings.doses)):
            ids, mask = np.asarray(batch.ids)[i], np.asarray(batch.mask)[i]
            texts[d, i] = [tokenizer.decode(row[real]) for row, real in zip(ids, mask)]
            verdict[d, i] = verdicts(model, tokenizer, texts[d, i].tolist())
            text = mj.Tokens(ids, mask)
            surprise[d, i] = mj.metrics.cross_entropy(text)(mj.run(model, text))
    dims = ("direction", "dose", "prompt")
    coords = {"direction": list(DIRECTIONS), "dose": list(settings.doses), "prompt": list(settings.prompts)}
    attrs = {"model": settings.model, "layer": settings.layer, "vector_norm": float(jnp.linalg.norm(vector))}
    data = {"verdict": (dims, verdict), "surprise": (dims, surprise), "text": (dims, texts.astype(str))}
    return xr.Dataset(data, coords, attrs)


def main(settings: Settings) -> xr.Dataset:
    """Run the study, print samples, and write figure, data and samples under `settings.out`."""
    mj.compilation_cache()
    model, tokenizer = record.load(settings.model)
    if not 0 <= settings.layer < model.config.n_layers:
        raise SystemExit(f"--layer {settings.layer}: the model has layers 0 to {model.config.n_layers - 1}")
    results = study(model, tokenizer, settings)
    for dose in (settings.doses[0], 0.0, settings.doses[-1]):
        if dose in settings.doses:
            print(f"dose {dose:+.1f}: {results.text.sel(direction='steering', dose=dose).values[1].item()!r}")
    print("\n dose  verdict (good - bad): steering, random    surprise (nats per token): steering, random")
    means = results[["verdict", "surprise"]].mean("prompt")
    for dose in settings.doses:
        row = [float(means[name].sel(direction=d, dose=dose)) for name in ("verdict", "surprise") for d in DIRECTIONS]
        print(f"{dose:+5.1f} {row[0]:>31.2f} {row[1]:>7.2f} {row[2]:>36.2f} {row[3]:>7.2f}")
    _write(settings, results)
    print(f"\nwrote {settings.out}/: steering.png, results.nc, samples.json")
    return results


def _write(settings: Settings, results: xr.Dataset) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    labels = {"verdict": 'verdict: logit "good" - "bad"', "surprise": "surprise (nats per token)"}
    for axis, (name, label) in zip(figure.subplots(1, 2), labels.items()):
        for direction in DIRECTIONS:
            values = results[name].sel(direction=direction)
            mean, error = values.mean("prompt"), values.std("prompt", ddof=1) / len(settings.prompts) ** 0.5
            axis.errorbar(settings.doses, mean, error, marker="o", capsize=2, label=direction)
        axis.set(xlabel=f"dose (times the difference of means, layer {settings.layer})", ylabel=label)
    figure.axes[0].legend(title="mean and standard error over prompts", title_fontsize="small")
    figure.suptitle(f"{settings.model}: steering while generating")
    plots.save(figure, settings.out / "steering.png")
    with atomic(settings.out / "results.nc") as scratch:
        results.to_netcdf(scratch, engine="scipy")
    samples = {
        d: {str(dose): results.text.sel(direction=d, dose=dose).values.tolist() for dose in settings.doses}
        for d in DIRECTIONS
    }
    with atomic(settings.out / "samples.json") as scratch:
        scratch.write_text(json.dumps(samples, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
