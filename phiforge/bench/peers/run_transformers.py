"""Hugging Face transformers as a contestant: `generate`, and a plain training loop.

Started by `phiforge bench` with the peer environment's Python; reads JSON lines, see `protocol`.
Settings: model (folder), dtype, compile, threads, device, and what `torch_training` wants.
"""

import time
from typing import Any

import protocol
import torch
import torch_training
import transformers
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Sampler:
    """A model that generates."""

    def __init__(self, settings):
        self.settings = settings
        self.model: Any = load(settings, DTYPES[settings["dtype"]]).eval()
        # Fixed lengths: no contestant stops at an end token.
        self.model.generation_config = GenerationConfig(pad_token_id=0)
        self.about = about()

    @torch.inference_mode()
    def run(self, request):
        """Generate in calls of `rows_per_call` rows of one length; all rows at once when 0."""
        calls = self.calls(request)
        config = self.generation(request)
        torch.manual_seed(request["seed"])
        token_ids, num_tokens = [], 0
        synchronize(self.model.device)
        started = time.perf_counter()
        for prompts in calls:
            ids_bt = torch.tensor(prompts, device=self.model.device)
            out_bt = self.model.generate(
                input_ids=ids_bt,
                attention_mask=torch.ones_like(ids_bt),
                generation_config=config,
            )
            new_bt = out_bt[:, ids_bt.shape[1] :]
            num_tokens += new_bt.numel()
            token_ids += new_bt.tolist()
        seconds = time.perf_counter() - started
        greedy = request["temperature"] == 0
        return {
            "seconds": seconds,
            "tokens": num_tokens,
            "token_ids": token_ids if greedy else None,
            **torch_training.device_memory(self.model.device),
        }

    def calls(self, request):
        """Lists of rows: a call per prompt and `rows_per_call` samples, or one call for all."""
        rows, n = self.settings.get("rows_per_call", 0), request["n"]
        if rows:
            # One call a prompt is enough to know the rate: further ones do the same again.
            return [[prompt] * rows for prompt in request["prompts"]]
        return [[prompt for prompt in request["prompts"] for _ in range(n)]]

    def generation(self, request):
        """Fixed length, greedy or temperature sampling from all tokens."""
        values = {"max_new_tokens": request["max_tokens"], "pad_token_id": 0}
        if request["temperature"] == 0:
            values["do_sample"] = False
        else:
            values |= {"do_sample": True, "temperature": request["temperature"]}
            values |= {"top_k": 0, "top_p": 1.0}
        if self.settings.get("compile"):
            compiled = CompileConfig(mode="default", fullgraph=False, dynamic=False)
            # By itself generate compiles on GPUs only.
            setattr(compiled, "_compile_all_devices", True)  # noqa: B010
            values |= {"cache_implementation": "static", "compile_config": compiled}
        return GenerationConfig(**values)


def load(settings, dtype):
    """The model, on its device, its attention by torch's scaled_dot_product_attention."""
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=dtype, attn_implementation="sdpa"
    )
    return model.to(settings["device"])


def about():
    """Versions, for the record."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def synchronize(device):
    """Wait for a GPU; a CPU has nothing pending."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Trainer(torch_training.Trainer):
    """The same model in a training loop: fp32 parameters, autocast for bf16."""

    def __init__(self, settings):
        model = load(settings, torch.float32).train()
        model.config.use_cache = False
        self.forward = torch.compile(model) if settings.get("compile") else model
        super().__init__(model, settings, no_decay=("embed_tokens.weight",))
        self.about = about()

    def loss(self, batch):
        """Mean next-token loss; positions that start again keep packed documents apart."""
        targets_bt = batch["targets"]
        # The model shifts labels by one itself; a row's last position never has a target.
        labels_bt = torch.full_like(targets_bt, -100)
        labels_bt[:, 1:] = targets_bt[:, :-1]
        out = self.forward(
            input_ids=batch["token_ids"], position_ids=batch["positions"], labels=labels_bt
        )
        return out.loss


def prepare(settings):
    """A sampler or a trainer."""
    return Trainer(settings) if settings["task"] == "train" else Sampler(settings)


if __name__ == "__main__":
    protocol.serve(prepare, lambda state, request: state.run(request))
