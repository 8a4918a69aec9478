"""Files from strangers, law by law: mutations of every format, and what a mutation would not hit by chance."""

import os
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import mijax as mj
from mijax.checkpoints import bundled, chat_process, chat_worker
from mijax.files import read_arrays
from tests.files import formats, limits
from tests.files.law import FORMATS, Mutation, judged, mutation, written
from tests.situations import refused
from tests.situations.checkpoints import copy, set_config


def law(name: str, mutations: int):
    """Fails at the first mutation of a format that is a fault."""
    format = FORMATS[name]()

    @settings(max_examples=mutations, derandomize=True, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def run(data):
        change = data.draw(mutation(format))
        outcome = judged(format, change)
        assert not outcome.is_fault, f"{outcome.kind}: {change.label}: {outcome.text}"

    run()


@pytest.mark.parametrize("name", FORMATS)
def test_a_hundred_mutations(name):
    law(name, 100)


@pytest.mark.parametrize("name", FORMATS)
def test_two_thousand_mutations(name):
    law(name, 2000)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "configs of all families"])
def test_a_file_as_it_should_be_is_read(name):
    """So that the law does not hold because everything is refused."""
    assert judged(FORMATS[name](), Mutation("none", {})).kind in ("equal", "unknown")


@pytest.mark.parametrize("kind", [kind for kind in formats.FAMILIES if kind in formats.REFERENCES])
def test_a_config_as_it_should_be_is_read(kind):
    change = Mutation(kind, {"config.json": formats.family_json(kind)})
    assert judged(FORMATS["configs of all families"](), change).kind == "unknown"


def test_the_judge_sees_each_kind_of_fault(monkeypatch):
    """A reading that is wrong in one way, of files as they should be."""
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    right = FORMATS["safetensors"]()

    def with_read(read, expected=right.expected):
        return formats.Format(right.files, right.mutated, read, expected)

    def raises(error):
        def read(folder):
            raise error(f"{folder}" if error is not RuntimeError else "")

        return with_read(read)

    def unnamed(folder):
        raise ValueError("something is wrong")

    def slow(folder):
        until = time.process_time() + limits.SECONDS + 0.2
        while time.process_time() < until:
            pass
        return right.read(folder)

    def large(folder):
        np.ones(int((limits.MEGABYTES + 100) * 2**20), np.uint8)
        return right.read(folder)

    def endless(folder):
        time.sleep(100)

    def outside(folder):
        (folder.parent / "x").write_text("")
        return right.read(folder)

    def other_numbers(folder):
        value = right.read(folder)
        return value | {".W_E": value[".W_E"] + 1e-3}

    def refuses(folder):
        raise formats.Unreadable("it is wrong")

    as_it_is = Mutation("none", {})
    kinds = {
        "raw error": [raises(KeyError), raises(RuntimeError), raises(RecursionError), raises(OSError)],
        "unnamed": [with_read(unnamed)],
        "costly": [with_read(slow), *([with_read(large)] if limits._STATUS.exists() else [])],
        "outside": [with_read(outside)],
        "silent": [with_read(other_numbers), with_read(right.read, refuses)],
        "refused": [raises(ValueError), raises(FileNotFoundError)],
    }
    for kind, wrong in kinds.items():
        for format in wrong:
            assert judged(format, as_it_is).kind == kind
    monkeypatch.setattr(limits, "_LONGEST", 1.0)
    assert judged(with_read(endless), as_it_is).kind == "endless"


@pytest.mark.parametrize(
    "name, file", [(n, f) for n, make in FORMATS.items() if n != "TransformerLens" for f in make().mutated]
)
def test_a_pipe_is_not_waited_for(name, file):
    """Nothing writes to it: opening it would never end."""
    outcome = judged(FORMATS[name](), Mutation("a pipe", {file: "pipe"}))
    assert not outcome.is_fault, outcome


# ---- config.json and tensors


def test_a_config_that_speaks_of_more_than_the_file_holds(tmp_path):
    """Sizes up to the largest that are accepted are held against the tensors before anything is made of them."""
    for key, message in {
        "num_hidden_layers": "must be at most 10000|in a file of [0-9]+ numbers",
        "hidden_size": "must be at most 268435456|in a file of [0-9]+ numbers",
        "vocab_size": "in a file of [0-9]+ numbers",
        "intermediate_size": "in a file of [0-9]+ numbers",
        "num_attention_heads": "must be at most|not a multiple of|in a file of [0-9]+ numbers",
    }.items():
        for size in (2**31 - 1, 9_999):
            folder = set_config(copy(tmp_path, "llama_gqa"), **{key: size})
            with limits.measured() as cost, refused(ValueError, message):
                mj.load(folder)
            assert not cost.excess, (key, cost.excess)
    with refused(ValueError, "num_hidden_layers=2147483647 must be at most 10000"):
        mj.load(set_config(copy(tmp_path, "llama_gqa"), num_hidden_layers=2**31 - 1))
    with refused(ValueError, "vocab_size=1000000000000 must be at most 2147483647"):
        mj.load(set_config(copy(tmp_path, "llama_gqa"), vocab_size=10**12))


def test_experts_without_end(tmp_path):
    formats.write_family("olmoe", tmp_path / "model")
    with (
        limits.measured() as cost,
        refused(ValueError, r"in a file of|missing model.layers.0.mlp.experts.4.up_proj.weight.*and \d+ more"),
    ):
        mj.load(set_config(tmp_path / "model", num_experts=2**31 - 1))
    assert not cost.excess
    with refused(ValueError, "missing model.layers.0.mlp.experts.4.up_proj.weight"):
        mj.load(set_config(tmp_path / "model", num_experts=10))


def test_a_tensor_whose_axis_is_empty_and_whose_other_is_endless(tmp_path):
    """It takes no byte of the file, and is held against the config like any other."""
    folder = copy(tmp_path, "llama_gqa")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.zeros((2**31, 0), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with refused(ValueError, r"model.norm.weight has shape \(2147483648, 0\), expected \(24,\)"):
        mj.load(folder)


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    folder = copy(tmp_path, "llama_gqa")
    from mijax.checkpoints import load

    real = load.tensors_of

    def changed(path):
        tensors = real(path)
        arrays = load_file(folder / "model.safetensors")
        save_file({name: x[:1] for name, x in arrays.items()}, folder / "model.safetensors")
        return tensors

    monkeypatch.setattr(load, "tensors_of", changed)
    with refused(ValueError, "model.safetensors has changed while it was read"):
        mj.load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/tmp/x.safetensors",
        "a/x.safetensors",
        "a\\x.safetensors",
        "x" * 300 + ".safetensors",
        "x.bin",
        "",
        "a\0.safetensors",
    ],
)
def test_an_index_that_leads_out_of_its_folder(name, tmp_path):
    format = FORMATS["shards"]()
    index = formats.json.dumps({"weight_map": {"lm_head.weight": name}})
    folder = written(tmp_path / "model", format, Mutation("", {"model.safetensors.index.json": index.encode()}))
    with refused(ValueError, "index.json names what are no safetensors files of its folder"):
        mj.load(folder)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "(?:x+)+y", ".*.*.*.*q", "(a)\\1", "x" * 300, "q_(", "a{99999999999}"]
)
def test_patterns_of_an_adapter_that_could_take_for_ever(pattern, tmp_path):
    format = FORMATS["adapter"]()
    settings = formats.json.loads(format.files["adapter_config.json"]) | {"alpha_pattern": {pattern: 3}}
    folder = written(
        tmp_path / "a", format, Mutation("", {"adapter_config.json": formats.json.dumps(settings).encode()})
    )
    with refused(
        ValueError, "adapter_config.json .*alpha_pattern holds the pattern .*expected a regular expression of at most"
    ):
        mj.load(formats.STORED / "llama_gqa", adapter=folder)


# ---- what was found by thinking of it, not by chance

_BASE = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
         "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}  # fmt: skip
_added = lambda i, text: {
    "id": i,
    "content": text,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}
_replace = lambda pattern, content: {"type": "Replace", "pattern": pattern, "content": content}
_sequence = lambda *steps: {"type": "Sequence", "normalizers": list(steps)}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}
TOKENIZERS = {
    "a long token of a unigram model": ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a" * 10**6, -1.0]], "byte_fallback": False}}, {}, "a token has 1000000 characters"),
    "a normaliser that writes much": ({"normalizer": _sequence(*[_replace({"String": "a"}, "a" * 4096)] * 3), "added_tokens": [_added(2, "a")]}, {}, "normalizer has a replacement of 4096 characters"),
    "a normaliser that doubles": ({"normalizer": _sequence(*[_replace({"String": "a"}, "aa")] * 24), "added_tokens": [_added(2, "a")]}, {}, "normalizer can make a text 16777216 times as long"),
    "a pattern that matches everywhere": ({"normalizer": _sequence(*[_replace({"Regex": ""}, "x" * 60)] * 2)}, {}, "normalizer can make a text 3721 times as long"),
    "a long prefix": ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**5}}, {}, "normalizer has a replacement of 100000 characters"),
    "a long pattern": ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\p{L}|" * 10**5}, "behavior": "Isolated", "invert": False}}, {}, "pre_tokenizer has a pattern of 600000 characters"),
    "a panic of the library": ({"normalizer": CHARSMAP}, {"special_tokens_map.json": {"bos_token": {"content": "<s>", "normalized": True}}}, "tokenizer.json cannot take the special tokens|not a readable tokenizer.json"),
    "a pattern that is retried": ({"normalizer": _replace({"Regex": "^(a+)+$"}, "b")}, {"added_tokens.json": {"a" * 40 + "b": 2}}, "tokenizer.json cannot take the special tokens"),
    "a number for a vocabulary": ({"model": {"type": "WordLevel", "vocab": 3, "unk_token": "a"}}, {}, "not a readable tokenizer.json"),
    "an id beyond 32 bits": ({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2**31}, "unk_token": "a"}}, {}, "the token 'b' has the id 2147483648, expected an id"),
    "a token called as the conversation": ({}, {"tokenizer_config.json": {"extra_special_tokens": {"messages": "evil"}}}, "a special token is called messages, as chat templates call the conversation"),
    "a long token beside it": ({}, {"tokenizer_config.json": {"bos_token": "a" * 2000}}, "bos_token must be a token .a text of up to 1024"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_end_or_stop_the_process(name, tmp_path):
    """Each crashed, panicked, took gigabytes or was silently something else; Rust's crashes cannot be caught, so they are refused before."""
    changes, files, message = TOKENIZERS[name]
    (tmp_path / "tokenizer.json").write_text(formats.json.dumps(_BASE | changes))
    for file, content in files.items():
        (tmp_path / file).write_text(formats.json.dumps(content))
    with limits.measured() as cost, refused(ValueError, message):
        mj.Tokenizer.from_folder(tmp_path)
    assert not cost.excess


def test_a_panic_while_a_text_is_encoded():
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(formats.json.dumps(_BASE | {"normalizer": CHARSMAP}))
    with refused(ValueError, "the tokenizer fails on these texts"):
        mj.Tokenizer(backend)(["a b"])


def test_end_tokens_without_end(tmp_path):
    (tmp_path / "tokenizer.json").write_text(formats.json.dumps(_BASE))
    (tmp_path / "generation_config.json").write_text(formats.json.dumps({"eos_token_id": list(range(2, 200_000))}))
    with limits.measured() as cost, pytest.warns(UserWarning, match="eos_token_id 2 is no token"):
        mj.Tokenizer.from_folder(tmp_path)
    assert not cost.excess


@pytest.mark.parametrize("changes, message", [
    ({"llama.expert_count": (2_000_000_000, formats.gguf_files.T.UINT32), "llama.expert_used_count": (2, formats.gguf_files.T.UINT32)}, "expert_count is 2000000000, and the file has no tensors of experts"),
    ({"llama.attention.head_count": 16, "llama.attention.scale": (0.5, formats.gguf_files.T.FLOAT32)}, "embedding_length must be a multiple of 16 heads"),
    ({"tokenizer.ggml.tokens": [*formats.gguf_files.TOKENS[:-1], "a" * 400_000]}, "tokenizer.ggml.tokens has a token of 400000 characters"),
    ({f"x{i}": (1, formats.gguf_files.T.UINT32) for i in range(1000)}, "the key x0 .1. is not known; .*992 more keys are not known"),
    ({"x" * 300: (1, formats.gguf_files.T.UINT32)}, "a name of 300 characters"),
    ({"x\x1b[31m": (1, formats.gguf_files.T.UINT32)}, "a name of 6 characters, 'x.x1b"),
], ids=lambda x: "" if isinstance(x, dict) else x[:30])  # fmt: skip
def test_metadata_of_gguf_that_take_for_ever_or_divide_by_zero(changes, message, tmp_path):
    formats.gguf_files.write(tmp_path / "x.gguf", changes)
    with limits.measured() as cost, refused(ValueError, message):
        mj.load(tmp_path / "x.gguf")
    assert not cost.excess


def _with_header(folder, change):
    """The header's text, changed."""
    file = folder / "model.safetensors"
    header, data = formats.mutations.unpacked(file.read_bytes())
    file.write_bytes(formats.mutations.packed(change(header).encode(), data))
    return folder


def test_headers_of_safetensors_that_say_something_twice_or_too_much(tmp_path):
    twice = lambda h: (
        '{"transformer.wte.weight": {"dtype": "F32", "shape": [24, 61], "data_offsets": [0, 5856]}, '
        + formats.json.dumps(h)[1:]
    )
    dims = lambda h: formats.json.dumps(
        h | {"h.0.attn.bias": {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]}}
    )
    name = lambda h: formats.json.dumps(h | {"x" * 10**6: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    control = lambda h: formats.json.dumps(h | {"a\nb": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    long = lambda h: formats.json.dumps(h) + " " * 2**24
    for change, message in {
        twice: "the key 'transformer.wte.weight' is there twice", dims: "h.0.attn.bias has shape .0, 1152921504606846976., of more than",
        name: "a name of 1000000 characters", control: "a name of 3 characters", long: "header too large",
    }.items():  # fmt: skip
        folder = _with_header(copy(tmp_path, "gpt2"), change)
        with limits.measured() as cost, refused(ValueError, f"model.safetensors is not a readable .*{message}"):
            mj.load(folder)
        assert not cost.excess


def test_an_adapter_with_two_tensors_for_one(tmp_path):
    format = FORMATS["adapter"]()
    folder = written(tmp_path / "a", format, Mutation("", {}))
    halves = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in halves if "lora_A" in name)
    for other in (name.removeprefix("base_model.model."), name.replace("base_model.model.model.", "base_model.model.")):
        save_file({**halves, other: 100 * halves[name]}, folder / "adapter_model.safetensors")
        with refused(ValueError, "lora_A.weight and .*lora_A.weight are for the same tensor"):
            mj.load(formats.STORED / "llama_gqa", adapter=folder)


@pytest.mark.parametrize("name, entries, message", [
    ("gpt2", {"n_embd": 2**30, "n_head": 2, "n_inner": None}, "n_embd=1073741824 must be at most 268435456"),
    ("gpt2", {"vocab_size": "x" * 10**6}, r"vocab_size='x+\.\.\.x+' must be an integer"),
    ("llama_gqa", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}}, "base=1.0 must be above 1 for yarn"),
])  # fmt: skip
def test_configs_that_divide_by_zero_or_fill_the_screen(name, entries, message, tmp_path):
    with refused(ValueError, message):
        mj.load(set_config(copy(tmp_path, name), **entries))


def test_a_share_that_rotates_nothing(tmp_path):
    """0 would stand for all dimensions."""
    formats.write_family("gpt_neox", tmp_path / "m")
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.1}
    with refused(ValueError, "partial_rotary_factor=0.1 of a head of 6 rotates no dimension"):
        mj.load(set_config(tmp_path / "m", rope_parameters=rope))


@pytest.mark.skipif(not limits._STATUS.exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_to_a_file_that_the_system_makes_up(name, tmp_path):
    format = FORMATS["tokenizer"]()
    folder = written(tmp_path / "t", format, Mutation("", {}))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/proc/self/mem")
    with refused(ValueError, f"{name} cannot be read"):
        mj.load(folder) if name == "config.json" else mj.Tokenizer.from_folder(folder)


def test_a_text_that_is_too_large(tmp_path):
    folder = copy(tmp_path, "gpt2")
    (folder / "config.json").write_text('{"model_type": "gpt2", "x": [' + "[]," * 3_000_000 + "[]]}")
    with limits.measured() as cost, refused(ValueError, "config.json has more than 4194304 bytes"):
        mj.load(folder)
    assert not cost.excess


# ---- chat templates

USER = [{"role": "user", "content": "hi"}]
_tokenizer = lambda template: mj.Tokenizer(formats.folders.backend(), template)
ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long product": "{{ 'a' * 10**10 }}", "a doubling string": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "lorem ipsum": "{{ lipsum(n=10**6) }}",
    "a power": "{{ 9**(9**9) }}", "a wide number": "{{ '%999999999d' % 1 }}", "a wide text": "{{ 'a'.ljust(10**10) }}", "a wide format": "{{ '{:>9999999999}'.format(1) }}",
    "lists of lists": "{{ [[0] * 99999] * 99999 }}", "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an indent": "{{ messages | tojson(indent=10**9) }}", "a replacement": "{{ ('a' * 99999) | replace('a', 'b' * 9999) }}",
    "a long text": "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "a list in itself": "{% set x = [[]] %}{% for i in range(99999) %}{% set x = [x] %}{% endfor %}{{ x }}{{ " + "[" * 150 + "]" * 150 + " }}",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end(name):
    """It ends within its bounds, as one kind of error; the next template is rendered as if nothing had been."""
    started = time.monotonic()
    try:
        text = _tokenizer(ENDLESS[name]).render(USER)
    except mj.ChatTemplateError as error:
        assert "chat template" in str(error)
    else:  # which does end
        assert len(text) <= chat_worker.CHARACTERS + chat_worker.GROWTH * 200_000 and name == "a list in itself"
    assert time.monotonic() - started < chat_process.LONGEST + 5
    assert _tokenizer("{{ messages[0].content }}").render(USER) == "hi"


def test_what_a_template_takes_is_bounded_in_its_own_process():
    """Its memory is none of this process; it says which bound it has met."""
    for template, message in {
        ENDLESS["nested ranges"]: "takes more than 1 s of processor time",
        ENDLESS["a doubling string"]: "takes more than 160 MiB of memory",
        "{{ 'a' * 10**6 }}": "gives 1000000 characters, expected at most 5[0-9]{5}",
    }.items():
        with limits.measured() as cost, refused(mj.ChatTemplateError, message):
            _tokenizer(template).render(USER)
        assert not cost.excess
    assert len(_tokenizer("{{ 'a' * 500000 }}").render(USER)) == 500_000
    document = [{"role": "user", "content": "long " * 10**6}]  # what it is given, it may give
    assert len(_tokenizer("{{ messages[0].content * 3 }}").render(document)) == 15 * 10**6


def test_templates_do_not_take_each_others_memory():
    """Long ones are not kept once they are compiled; one that fails takes its memory with it."""
    for i in range(4):
        assert len(_tokenizer("{# " + "x" * 14_000_000 + f" #}}{{{{ 'a' * {i} }}}}").render(USER)) == i


def test_messages_of_templates_are_bounded():
    for template, message in {
        "{{ raise_exception('x' * 3000000) }}": r"x{2000}\.\.\. \(3000000 characters\)",
        "{% set n = namespace(x=[]) %}{% for i in range(5000) %}{% set n.x = [n.x] %}{% endfor %}{{ raise_exception(n.x) }}": r"an error whose message cannot be written|fails on|\[\[\[",
    }.items():
        with refused(mj.ChatTemplateError, message):
            _tokenizer(template).render(USER)
    deep = "x"
    for _ in range(5000):
        deep = [deep]
    with refused(ValueError, "nested too deeply for a template"):
        _tokenizer("x").render([{"role": "user", "content": deep}])


def test_a_template_that_waits_is_ended_by_the_clock(monkeypatch):
    """As on a system without timers of processor time."""
    monkeypatch.setattr(chat_process, "LONGEST", 0.3)
    monkeypatch.setattr(chat_process, "_started", lambda: _python("import time; time.sleep(100)"))
    chat_process._WORKER.end()
    with refused(mj.ChatTemplateError, "takes more than 0.3 s"):
        _tokenizer("x").render(USER)


def test_a_process_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(chat_process, "_started", lambda: _python("raise SystemExit(3)"))
    chat_process._WORKER.end()
    with refused(mj.ChatTemplateError, "the process that renders it ended with status 3"):
        _tokenizer("x").render(USER)


def _python(code):
    import subprocess
    import sys

    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_templates_of_many_threads_do_not_mix():
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = _tokenizer("{{ messages[0].content }}")
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: tokenizer.render([{"role": "user", "content": str(i)}]), range(200)))
    assert texts == [str(i) for i in range(200)]


def test_a_forked_process_has_a_worker_of_its_own():
    """It would read the answers of its parent's."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    import subprocess
    import sys

    code = """
import os
from mijax.checkpoints.chat_process import rendered
assert rendered("{{ a }}", {"a": 1}) == "1"
child = os.fork()
for i in range(100):
    assert rendered("{{ a }}", {"a": i + 1000 * (child == 0)}) == str(i + 1000 * (child == 0))
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert process.stdout == "done\n", process.stderr


# ---- what mijax keeps


def test_a_cache_whose_place_is_taken_or_closed(tmp_path, monkeypatch):
    """One error each, which says what variable moves the cache; once it can be written to, the model is loaded."""
    (tmp_path / "file").write_text("")
    with (
        formats._bundle(tmp_path / "file"),
        refused(ValueError, r"tiny cannot be kept in .*file: .*MIJAX_CACHE names another folder"),
    ):
        mj.load("tiny")
    import errno
    import shutil

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    for target, name in ((bundled, "_convert"), (bundled.tempfile, "TemporaryDirectory")):
        with monkeypatch.context() as patch, formats._bundle(tmp_path / "cache"):
            patch.setattr(target, name, full)
            with refused(
                ValueError, r"tiny cannot be kept in .*cache: No space left on device \(x\). MIJAX_CACHE names"
            ):
                mj.load("tiny")
    assert not list((tmp_path / "cache").glob("*"))
    formats._load_bundle(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")


def test_weights_are_not_read_twice_to_be_checked(tmp_path, monkeypatch):
    """A checksum is taken where size or time differ from what was recorded, and nowhere else."""
    formats._load_bundle(tmp_path)
    taken = []
    real = bundled._sha256
    monkeypatch.setattr(bundled, "_sha256", lambda path: taken.append(path.name) or real(path))
    formats._load_bundle(tmp_path)
    assert taken == []
    weights = next(tmp_path.glob("*/model.safetensors"))
    os.utime(weights, ns=(1, 1))  # as a copy would have
    formats._load_bundle(tmp_path)
    assert taken == ["model.safetensors"] * 2


def test_an_array_that_says_it_is_larger_than_its_file(tmp_path):
    format = FORMATS["sweep"]()
    folder = written(tmp_path / "sweep", format, Mutation("", {}))
    name = "chunk_000000.npz"
    content = formats.mutations.zipfile.ZipFile(folder / name)
    members = {info.filename: content.read(info) for info in content.infolist()}
    with formats.mutations.zipfile.ZipFile(folder / name, "w") as file:
        for member, data in members.items():
            file.writestr(
                member, data.replace(b"'shape': (", b"'shape': (999999999, ") if member != "checksum.npy" else data
            )
    with (
        limits.measured() as cost,
        pytest.warns(UserWarning, match=f"{name} cannot be read .*would have the shape .*computed again"),
    ):
        assert (formats._sweep(folder) == format.expected(folder)["effects"]).all()
    assert not cost.excess
    assert read_arrays(folder / name).keys() >= {"checksum"}
