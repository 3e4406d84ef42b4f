"""llama.cpp, as the wheel xllamacpp has it: what it computes of a GGUF file, and how it splits text."""

import importlib.util
import json
import subprocess
import sys
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("xllamacpp, which has llama.cpp, has no wheel for this system", allow_module_level=True)

# A process of its own: an assertion of llama.cpp ends it, and the server now and then waits for itself as it goes.
SERVE = """
import sys
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.verbosity, settings.warmup, settings.fit_params = sys.argv[1], -1, False, False
settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 256, 1, 0
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class Engine:
    """A file that llama.cpp has loaded. It computes in float32 on one thread and keeps nothing of earlier prompts.

    Raises RuntimeError for a file that it does not load."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        words, pipe = [sys.executable, "-c", SERVE, str(path)], subprocess.PIPE
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        weakref.finalize(self, _end, process)
        assert process.stdout is not None
        self.address, self.vocab_size = process.stdout.readline().strip(), vocab_size
        if not self.address.startswith("http"):
            raise RuntimeError(f"llama.cpp does not load {path}")

    def log_probs(self, ids: list[int]) -> Tensor:
        """Of every token behind these, in nats, (V,) float32."""
        # It says nothing of a token that ends inside a character, so it is made to say one that does not.
        answer = self._post("completion", prompt=ids, n_predict=1, n_probs=self.vocab_size, logit_bias=[[65, 1000]])
        said = answer["completion_probabilities"][0]["top_logprobs"]
        assert len(said) == self.vocab_size
        log_probs_V = torch.empty(self.vocab_size)
        log_probs_V[[token["id"] for token in said]] = torch.tensor([token["logprob"] for token in said])
        return log_probs_V

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """The likeliest token behind these, n times, or until one ends the text."""
        return self._post("completion", prompt=ids, n_predict=n)["tokens"]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Its ids of a text, special tokens in it taken for text; `special`: looked for, and put around it if told."""
        return self._post("tokenize", content=text, add_special=special, parse_special=special)["tokens"]

    def _post(self, what: str, **body: Any) -> Any:
        always = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
        request = urllib.request.Request(f"{self.address}/{what}", json.dumps(body | always).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
