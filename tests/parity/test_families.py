"""Law 1 for every family that mijax reads: against transformers on CPU torch, over variants of its config."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.checkpoints.registry import FAMILIES
from tests.architectures import error
from tests.reference import sites
from tests.reference.captures import outputs
from tests.reference.families import CASES, REFERENCES, make
from tests.reference.tiny_models import PADDINGS, inputs

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
NEW_TOKENS = 20


def check_parity(ours, theirs, padding):
    ids, mask = inputs(padding)
    real = mask.astype(bool)
    logits, hidden = outputs(theirs, ids, mask)
    hidden = np.stack(hidden)
    out = mj.run(ours, mj.Tokens(ids, mask), capture=tuple(ours.sites))  # one program with `sites.compared`
    assert error(np.asarray(out.logits)[real], logits[real]) < 1e-4
    streams = np.concatenate([out.acts["resid_pre"], out.readout.final[None]])
    for layer, (mine, other) in enumerate(zip(streams[:, real], hidden[:, real], strict=True)):
        assert error(mine, other) < 1e-4, layer


def test_every_family_is_compared():
    assert {*FAMILIES} - {*REFERENCES} == {"mijax"}


@pytest.mark.parametrize("family, variant", CASES)
def test_family(family, variant, tmp_path):
    """float32 at 1e-4: logits, every layer's stream, every site, greedy tokens; and what is saved is read by transformers."""
    import torch
    import transformers

    theirs = make(family, variant)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = mj.load(tmp_path / "theirs")
    for padding in PADDINGS:
        check_parity(ours, theirs, padding)
    page = sites.read()[family]
    for site, (kind, off) in sites.compared(family, theirs, ours).items():
        assert off < 1e-4, site
        assert page[site].startswith(sites.IDENTITY) == (kind == sites.IDENTITY), (
            site
        )  # in the table of docs/verification.md
    if variant == 0:
        assert min(sites.moved(ours).values()) > 1e-3
    # a wrong reading fails: two query heads swapped
    W_Q = ours.blocks.attn.W_Q
    swapped = eqx.tree_at(lambda m: m.blocks.attn.W_Q, ours, W_Q.at[:, :, :2].set(W_Q[:, :, 1::-1]))
    ids = inputs("none")[0]
    assert error(mj.run(swapped, ids).logits, mj.run(ours, ids).logits) > 1e-3
    # 20 greedy tokens, or the first that differs is a tie
    sequence = torch.tensor(ids[:1])
    for token in np.asarray(mj.generate(ours, ids[:1], max_new_tokens=NEW_TOKENS).ids)[0, ids.shape[1] :]:
        with torch.no_grad():
            last = theirs(sequence).logits[0, -1].numpy()
        if last.argmax() != token:
            assert last.max() - last[token] < 1e-4 * np.abs(last).max()
        sequence = torch.cat([sequence, torch.tensor([[int(token)]])], dim=1)
    # saved by mijax, read by transformers
    kind = mj.save(ours, tmp_path / "ours")
    assert kind != "mijax"
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="float32", attn_implementation="eager"
    )
    check_parity(ours, again.eval(), "left")
    back, _ = mj.load(tmp_path / "ours")
    assert back.config == ours.config
    assert error(mj.run(back, ids).logits, mj.run(ours, jnp.asarray(ids)).logits) < 1e-5
