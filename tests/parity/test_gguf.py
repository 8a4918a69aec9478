"""GGUF files of every architecture that is read: the logits of the model that they were made from, on CPU torch."""

import gguf
import pytest

import mijax as mj
from mijax.checkpoints.gguf_architectures import ARCHITECTURES
from tests.architectures import error
from tests.parity.test_families import outputs
from tests.reference.gguf_models import CASES, make, write
from tests.reference.tiny_models import inputs

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def test_every_architecture_is_compared():
    assert {gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[case.arch]] for case in CASES.values()} == {*ARCHITECTURES}


@pytest.mark.parametrize("name", CASES)
def test_file(name, tmp_path):
    """float32 at 1e-4 of the largest logit; transformers' own reader gives them too, where it reads such files rightly."""
    import transformers

    case = CASES[name]
    theirs = make(case)
    path = write(case, theirs, tmp_path)
    ids, mask = inputs("none")
    expected, _ = outputs(theirs, ids, mask)
    ours, tokenizer = mj.load(path, tokenizer=False)
    assert tokenizer is None and error(mj.run(ours, ids).logits, expected) < 1e-4
    if case.read_by_transformers:
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, dtype="float32", attn_implementation="eager"
        )
        assert error(outputs(again.eval(), ids, mask)[0], expected) < 1e-4
