"""The activations of a transformers model, at the sites of mijax: recorded by hooks, arranged as the family's table arranges parameters.

A map of a checkpoint and the module that applies it have the same name. What the module reads or writes is arranged as
its weight is, each token in the place of a number of the stream: the forward pass of mijax has no part in it.
"""

import contextlib
import importlib
from unittest import mock

import einops
import numpy as np

from mijax.checkpoints.registry import FAMILIES
from mijax.checkpoints.tensors import axis_sizes
from tests.architectures import existing


def outputs(model, ids, mask):
    """Logits, and the stream before each layer and at the end, of a model of transformers; positions are given where it takes them."""
    import inspect

    import torch

    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    takes = "position_ids" in inspect.signature(model.forward).parameters
    narrowed = []  # OPT-350m's last "hidden state" is narrower than the stream, from which a matrix makes it
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("project_out"):
                handle = module.register_forward_pre_hook(lambda _, arguments: narrowed.append(arguments[0]))
                stack.callback(handle.remove)
        out = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True,
            **({"position_ids": positions} if takes else {}),
        )  # fmt: skip
    hidden = [*out.hidden_states[:-1], *(narrowed or out.hidden_states[-1:])]
    return out.logits.numpy(), [x.numpy() for x in hidden]


class Recorded:
    """What a forward pass of `theirs` computed, by site of mijax, each `[layer, ...]` (the layers that have it) in the site's order of axes.

    Args:
        family: the name of the family.
        theirs: the torch model.
        ours: the model that mijax loaded, of which only the config and the weights of norms are read.
        ids: `[batch, pos]`.
        mask: which of them are tokens.
    """

    def __init__(self, family, theirs, ours, ids, mask):
        self.family, self.theirs, self.config, self.ours = FAMILIES[family], theirs, ours.config, ours
        self.table = {path: w for w in self.family.weights(ours.config) for path in w.ours}
        self.shape = ids.shape
        self.inputs, self.outputs, self.softmax, self.read = {}, {}, [], []
        with contextlib.ExitStack() as stack:
            for name, module in theirs.named_modules():
                handle = module.register_forward_hook(self._hook(name))
                stack.callback(handle.remove)
            for patch in self._patches():
                stack.enter_context(patch)
            self.hidden = outputs(theirs, ids, mask)[1]

    def _hook(self, name):
        def keep(module, arguments, output):
            if arguments:
                self.inputs[name] = _numpy(arguments[0])
            self.outputs[name] = tuple(map(_numpy, output)) if isinstance(output, tuple) else _numpy(output)

        return keep

    def _patches(self):
        """Softmax over keys, and what attention reads: transformers has no module there."""
        import torch.nn.functional as F

        softmax = F.softmax

        def kept_softmax(x, *arguments, **keywords):
            out = softmax(x, *arguments, **keywords)
            if x.ndim == 4:
                self.softmax.append((_numpy(x), _numpy(out)))
            return out

        yield mock.patch.object(F, "softmax", kept_softmax)
        module = importlib.import_module(type(self.theirs).__module__)
        if hasattr(module, "eager_attention_forward"):
            eager = module.eager_attention_forward

            def kept_eager(attention, query, key, *arguments, **keywords):
                self.read.append((_numpy(query), _numpy(key)))
                return eager(attention, query, key, *arguments, **keywords)

            yield mock.patch.object(module, "eager_attention_forward", kept_eager)
        elif hasattr(module, "apply_rotary_pos_emb"):
            rotate = module.apply_rotary_pos_emb

            def kept_rotate(*arguments, **keywords):
                q, k = rotate(*arguments, **keywords)
                self.read.append((_numpy(q), _numpy(k)))
                return q, k

            yield mock.patch.object(module, "apply_rotary_pos_emb", kept_rotate)

    # --- places

    def module(self, path, layer=None):
        """The name of the module that holds a parameter; `None` where the family has no such parameter."""
        weight = self.table.get(path)
        if weight is None:
            return None
        name = weight.theirs.rpartition(".")[0].format(layer=layer, expert=0)
        known = self.outputs
        return next((n for n in (name, name.replace("block_sparse_moe", "mlp")) if n in known), None)

    def arranged(self, path, matrix):
        """`[token, ...]` in mijax's arrangement, of `[token, outputs]` (or inputs) in the checkpoint's."""
        weight, writes = self.table[path], path.endswith(("W_O", "W_out"))
        tensor = matrix if writes != self.family.inputs_first else matrix.T
        tensor = einops.rearrange(tensor, weight.axes, **axis_sizes(weight, self.config))
        part = np.asarray(weight.convert.read(tensor, self.config)[weight.ours.index(path)])
        return np.moveaxis(part, -1, 0) if writes else part

    def of_tokens(self, array):
        """`[batch, pos, ...]` of `[token, ...]`."""
        return array.reshape(*self.shape, *array.shape[1:])

    def flat(self, array):
        """`[token, numbers]`."""
        return array.reshape(-1, array.shape[-1])

    # --- sites

    def site(self, name):
        """The activation of a site, and how it is known: `"captured"`; `None` where transformers has no such tensor."""
        c = self.config
        if name in ("embed", "pos_embed", "final_in") or name.startswith(("ln_embed", "ln_final")):
            return self._outside(name)
        layers = existing(self.ours, name, np.arange(c.n_layers))
        acts = [self._inside(name, int(layer)) for layer in layers]
        return None if any(x is None for x in acts) else np.stack(acts)

    def _outside(self, name):
        pos = self.module("W_pos")
        if name == "pos_embed":
            return np.broadcast_to(self.outputs[pos], self.hidden[0].shape)
        if name == "embed":
            return self.hidden[0] - (0 if pos is None else self.outputs[pos])
        if name == "final_in":
            norm = self.module("ln_final.weight")
            return self.hidden[-1] if norm is None else self.inputs[norm]
        path, _, what = name.partition(".")
        return self._norm(self.module(f"{path}.weight"), getattr(self.ours, path), what)

    def _norm(self, module, norm, what):
        """The scale of a norm's input, or its output without weight and bias."""
        if module is None:
            return None
        x = self.inputs[module].reshape(*self.shape, -1).astype(np.float64)
        if what == "scale":
            x = x - x.mean(-1, keepdims=True) if self.config.norm == "layer" else x
            return np.sqrt((x * x).mean(-1) + self.config.norm_eps)
        y = self.outputs[module].reshape(*self.shape, -1).astype(np.float64)
        return (y - (0.0 if norm.bias is None else np.asarray(norm.bias))) / np.asarray(norm.weight)

    def _stream(self, layer):
        return self.hidden[layer] if layer < self.config.n_layers else self._outside("final_in")

    def _inside(self, name, layer):
        c = self.config
        at = lambda path: self.module(path, layer)
        if name in ("resid_pre", "resid_post"):
            return self._stream(layer + (name == "resid_post"))
        if name in ("q_input", "k_input", "v_input"):
            heads = c.n_heads if name == "q_input" else c.n_kv_heads
            return np.repeat(self._stream(layer)[:, :, None], heads, axis=2)
        path, _, what = name.partition(".")
        if what:
            shared = path == "ln2" and c.shared_norm
            path = "ln1" if shared else path
            norm = getattr(self.ours.blocks, path)
            layer_norm = type(norm)(norm.weight[layer], None if norm.bias is None else norm.bias[layer])
            return self._norm(at(f"blocks.{path}.weight"), layer_norm, what)
        if name in ("q", "k", "v"):
            path = f"blocks.attn.W_{name.upper()}"
            return self.of_tokens(self.arranged(path, self.flat(self.outputs[at(path)])))
        if name in ("rot_q", "rot_k"):
            return self._as_read(name, layer)
        if name in ("attn_scores", "pattern"):
            return self._attention(name, layer)
        if name == "z":
            return self.of_tokens(self.arranged("blocks.attn.W_O", self.flat(self.inputs[at("blocks.attn.W_O")])))
        if name == "attn_out":
            normed = None if c.norm_at == "stream" else at("blocks.ln1_post.weight")
            return self.outputs[normed or at("blocks.attn.W_O")]
        if name in ("resid_mid", "mlp_in"):
            return self._stream(layer) if c.parallel else self._middle(layer)
        return self._mlp(name, layer)

    def _middle(self, layer):
        if self.config.norm_at == "stream":
            return self.outputs[self.module("blocks.ln1_post.weight", layer)].reshape(*self.shape, -1)
        before = self.module("blocks.ln2.weight", layer) or self.module("blocks.mlp.W_in", layer)
        return self.inputs[before].reshape(*self.shape, -1)

    def _as_read(self, name, layer):
        if not self.read:
            return None
        array = np.moveaxis(self.read[layer][name == "rot_k"], 1, 2)
        c = self.config
        if name == "rot_k" and array.shape[2] == c.n_heads:  # Falcon repeats the keys first
            array = array[:, :, :: c.n_heads // c.n_kv_heads]
        path = f"blocks.attn.W_{name[-1].upper()}"
        if len(self.table[path].ours) > 1:
            return array
        return self.of_tokens(self.arranged(path, array.reshape(array.shape[0] * array.shape[1], -1)))

    def _attention(self, name, layer):
        scores, pattern = self.softmax[layer]
        keys = self.shape[1]
        if not self.config.sinks:
            return (scores if name == "attn_scores" else pattern)[..., :keys]
        # the largest was subtracted from scores and sink: the sink's own value gives it back
        sink = np.asarray(self.ours.blocks.attn.sinks[layer])[None, :, None]
        return pattern[..., :keys] if name == "pattern" else scores[..., :keys] + (sink - scores[..., keys])[..., None]

    def _mlp(self, name, layer):
        c = self.config
        at = lambda path: self.module(path, layer)
        shared = name.startswith("shared_")
        start = "blocks.experts.shared." if shared else "blocks.mlp."
        if name == "mlp_out":
            normed = None if c.norm_at == "stream" else at("blocks.ln2_post.weight")
            sparse = layer in c.expert_layers
            block = at("blocks.experts.W_router").rpartition(".")[0] if sparse else at("blocks.mlp.W_out")
            out = self.outputs[normed or block]
            return (out[0] if isinstance(out, tuple) else out).reshape(*self.shape, -1)
        if name in ("router_logits", "expert_weights"):
            logits, weights, chosen = self.outputs[at("blocks.experts.W_router")]
            if name == "expert_weights":
                logits = np.zeros_like(logits)
                np.put_along_axis(logits, chosen, weights, axis=-1)
            return self.of_tokens(logits)
        if name == "shared_out":
            gate = self.outputs[at("blocks.experts.W_shared_gate")]
            out = self.outputs[at(start + "W_out").rpartition(".")[0]]
            return self.of_tokens(self.flat(out) / (1 + np.exp(-self.flat(gate))))
        name = name.removeprefix("shared_")
        if name == "post":
            return self.of_tokens(self.arranged(start + "W_out", self.flat(self.inputs[at(start + "W_out")])))
        if name in ("pre", "pre_linear"):
            path = start + ("W_gate" if name == "pre" and c.mlp == "gated" else "W_in")
            return self.of_tokens(self.arranged(path, self.flat(self.outputs[at(path)])))
        return None  # result, expert_out: no tensor of transformers


def _numpy(x):
    return x.detach().clone().numpy() if hasattr(x, "detach") else x  # some modules add to their outputs in place
