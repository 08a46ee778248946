"""litgpt's GPT in a training loop with its chunked cross-entropy, bf16 by autocast.

Started by `phiforge bench` with the peer environment's Python; reads JSON lines, see `protocol`.
It has no document masks, so packed documents see each other: less work to skip, another loss.
"""

import json
from importlib import metadata
from pathlib import Path

import protocol
import torch
import torch_training
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file


class Trainer(torch_training.Trainer):
    """The same weights under litgpt's names."""

    def __init__(self, settings):
        folder = Path(settings["model"])
        model = GPT(make_config(json.loads((folder / "config.json").read_text())))
        model.load_state_dict(read_weights(folder))
        model.to(settings["device"]).train()
        self.forward = torch.compile(model) if settings.get("compile") else model
        super().__init__(model, settings, no_decay=("wte.weight",))
        self.about = {"litgpt": metadata.version("litgpt"), "torch": torch.__version__}

    def loss(self, batch):
        """Mean next-token loss, the logits' cross-entropy 128 tokens at a time."""
        return chunked_cross_entropy(self.forward(batch["token_ids"]), batch["targets"])


def make_config(values):
    """litgpt's configuration of a Phi-3 shape."""
    return Config(
        name="Phi-3-bench",
        block_size=values["max_position_embeddings"],
        vocab_size=values["vocab_size"],
        padded_vocab_size=values["vocab_size"],
        n_layer=values["num_hidden_layers"],
        n_head=values["num_attention_heads"],
        n_query_groups=values["num_key_value_heads"],
        n_embd=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        rotary_percentage=1.0,
        rope_base=int(values["rope_theta"]),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=values["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
    )


def read_weights(folder):
    """Tensors of a Phi-3 folder, renamed; gate and up come apart."""
    renamed = {
        "model.embed_tokens.weight": "transformer.wte.weight",
        "model.norm.weight": "transformer.ln_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
    within = {
        "self_attn.qkv_proj.weight": "attn.qkv.weight",
        "self_attn.o_proj.weight": "attn.proj.weight",
        "input_layernorm.weight": "norm_1.weight",
        "post_attention_layernorm.weight": "norm_2.weight",
        "mlp.down_proj.weight": "mlp.proj.weight",
    }
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name in renamed:
                found[renamed[name]] = tensor.float()
                continue
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            start = f"transformer.h.{layer}."
            if rest == "mlp.gate_up_proj.weight":
                gate, up = tensor.float().chunk(2, dim=0)
                found[start + "mlp.fc_1.weight"] = gate
                found[start + "mlp.fc_2.weight"] = up
            else:
                found[start + within[rest]] = tensor.float()
    return found


if __name__ == "__main__":
    protocol.serve(Trainer, lambda state, request: state.run(request))
