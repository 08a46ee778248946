"""llama.cpp through llama-cpp-python's low-level calls: several sequences in each decode call.

Started by `phiforge bench` with the peer environment's Python; reads JSON lines, see `protocol`.
Settings: gguf (file), threads, rows (most sequences at once), tokens_per_row, dtype. Greedy only.
"""

import ctypes
import time
from importlib import metadata

import llama_cpp
import numpy as np
import protocol


class Sampler:
    """A model and a context with room for `rows` sequences."""

    def __init__(self, settings):
        quiet()
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(settings["gguf"].encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {settings['gguf']}; its log says why")
        self.num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        rows, length = settings["rows"], settings["tokens_per_row"]
        self.capacity = max(512, rows * 32)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = rows
        params.n_ctx = rows * (-(-length // 256) * 256)
        params.n_batch = self.capacity
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.no_perf = True
        if settings["dtype"] == "f32":
            # The default cache is f16, and flash attention rounds too: tokens would differ.
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context; its log says why")
        self.batch = llama_cpp.llama_batch_init(self.capacity, 0, 1)
        self.about = {"llama-cpp-python": metadata.version("llama-cpp-python")}

    def run(self, request):
        """Greedy continuations of all prompts together, one decode call a step."""
        if request["temperature"] != 0 or request["n"] != 1:
            raise ValueError("this driver samples greedily, one sample a prompt")
        prompts, max_tokens = request["prompts"], request["max_tokens"]
        drawn = [[] for _ in prompts]
        started = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        last = self.prefill(prompts)
        for step in range(max_tokens):
            for row, token in enumerate(last):
                drawn[row].append(token)
            if step + 1 < max_tokens:
                last = self.decode(
                    [(row, token, len(prompts[row]) + step, True) for row, token in enumerate(last)]
                )
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": len(prompts) * max_tokens, "token_ids": drawn}

    def prefill(self, prompts):
        """Feed the prompts, as many whole ones in a call as fit; the first token of each."""
        first, waiting = [], []
        for row, prompt in enumerate(prompts):
            if waiting and len(waiting) + len(prompt) > self.capacity:
                first += self.decode(waiting)
                waiting = []
            end = len(prompt) - 1
            waiting += [(row, token, place, place == end) for place, token in enumerate(prompt)]
        return first + self.decode(waiting)

    def decode(self, tokens):
        """One call for (row, token, position, wanted) each; the likeliest token where wanted."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for place, (row, token, position, wanted) in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
            batch.logits[place] = wanted
        code = llama_cpp.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens gave {code}")
        num_wanted = sum(wanted for *_, wanted in tokens)
        logits = llama_cpp.llama_get_logits(self.context)
        logits_bv = np.ctypeslib.as_array(logits, (num_wanted, self.num_vocab))
        return logits_bv.argmax(axis=1).tolist()


@llama_cpp.llama_log_callback
def _errors_alone(level, text, data):
    if level == 3:  # GGML_LOG_LEVEL_ERROR
        print(text.decode(errors="replace"), end="", flush=True)


def quiet():
    """Keep its log to errors."""
    llama_cpp.llama_log_set(_errors_alone, ctypes.c_void_p(0))


if __name__ == "__main__":
    protocol.serve(Sampler, lambda state, request: state.run(request))
