"""Suite families: models of transformers against what is read of their folders here, family by family.

Tiny models with random weights, in float32, at every setting that a family leaves open. A row's numbers are the worst
of a family's variants: the relative error (Frobenius) of the logits and of the gradient of every weight by its name,
and how many tokens of greedy generation with a cache are transformers' own.

    python -m experiments.bench suite=families out=experiments/results/families.jsonl
"""

import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.suites.cases import Case, absent
from experiments.suites.timing import relative_error
from moe.convert.hf_families import FAMILIES
from moe.convert.hf_weights import load, to_hf
from moe.eval.generate import generate

HEADINGS = ("family", "variants", "logits, error", "gradients, error", "of so many", "tokens generated alike")
NEW = 27  # tokens: to the end of the context
LLAMA: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,  # OLMoE's default, 1, would stop the gradient of that token's embedding
    "eos_token_id": None,
}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 50.0}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 50.0}
GPT2: dict[str, Any] = {"vocab_size": 48, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DOTS1: dict[str, Any] = LLAMA | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
}
DOTS1 |= {"head_dim": 12, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
ERNIE: dict[str, Any] = LLAMA | {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 24, "head_dim": 12}
GROUPS = {"n_group": 4, "topk_group": 2}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12}  # which do not divide D
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 5}
GRANITEMOE: dict[str, Any] = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 6.0}
GRANITEMOE |= {"attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 3.0}
OLMOE = LLAMA | {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24}
QWEN3_MOE = LLAMA | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16}
QWEN2_MOE = QWEN3_MOE | {"shared_expert_intermediate_size": 48, "norm_topk_prob": True}
DEEPSEEK: dict[str, Any] = LLAMA | {"num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1}
DEEPSEEK |= {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
DEEPSEEK |= {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
MSCALE = {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}}
GPT_OSS: dict[str, Any] = LLAMA | {
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "head_dim": 12,
    "sliding_window": 5,
}
GPT_OSS |= {"num_hidden_layers": 3}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-narrow": ("gpt2", GPT2 | {"n_inner": 48, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    "llama": ("llama", LLAMA),
    "llama-tied-theta": ("llama", LLAMA | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 100.0}}),
    "llama-heads": ("llama", LLAMA | {"num_key_value_heads": 4, "head_dim": 12, "rms_norm_eps": 1e-2}),
    "llama-linear": ("llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama-biases": ("llama", LLAMA | {"attention_bias": True}),
    "mistral": ("mistral", LLAMA | {"sliding_window": 5}),
    "mistral-plain": ("mistral", LLAMA | {"sliding_window": None, "head_dim": 12}),
    "mistral-three-heads": ("mistral", LLAMA | HEADS | {"sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-window": ("qwen2", LLAMA | WINDOW | {"max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 12}),
    "qwen3-biases": ("qwen3", LLAMA | {"attention_bias": True}),
    "qwen3-yarn": ("qwen3", LLAMA | {"head_dim": 12, "rope_parameters": YARN}),
    "qwen3-windows": ("qwen3", LLAMA | WINDOW | {"max_window_layers": 1}),
    "qwen3-alternating": ("qwen3", LLAMA | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "olmo2": ("olmo2", LLAMA),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": ("mixtral", LLAMA | {"num_local_experts": 4, "sliding_window": 5}),
    "granitemoe": ("granitemoe", GRANITEMOE),
    "granitemoe-plain": ("granitemoe", LLAMA | {"num_local_experts": 4, "attention_multiplier": 8**-0.5}),
    "granitemoe-biases": ("granitemoe", GRANITEMOE | {"attention_bias": True, "tie_word_embeddings": True}),
    "olmoe": ("olmoe", OLMOE | {"norm_topk_prob": False}),
    "olmoe-renormalized": ("olmoe", OLMOE | {"norm_topk_prob": True, "num_key_value_heads": 4}),
    "flex_olmo": ("flex_olmo", OLMOE | {"norm_topk_prob": True, "attention_bias": True, "num_experts_per_tok": 4}),
    "qwen2_moe": ("qwen2_moe", QWEN2_MOE),
    "qwen2_moe-windows": ("qwen2_moe", QWEN2_MOE | WINDOW | {"qkv_bias": False, "mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3_moe-window": ("qwen3_moe", QWEN3_MOE | WINDOW),
    "qwen3_moe-one-layer": ("qwen3_moe", QWEN3_MOE | {"num_hidden_layers": 1}),
    "qwen3_moe-every-other": ("qwen3_moe", QWEN3_MOE | {"decoder_sparse_step": 2}),
    "qwen3_moe-first-dense": ("qwen3_moe", QWEN3_MOE | {"mlp_only_layers": [0], "tie_word_embeddings": True}),
    "deepseek_v2-lite": ("deepseek_v2", DEEPSEEK | MSCALE | {"q_lora_rank": None}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK | GROUPED | {"rms_norm_eps": 1e-2}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK | MSCALE | {"n_group": 4, "topk_group": 2}),
    "deepseek_v3-raw": ("deepseek_v3", DEEPSEEK | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "dots1": ("dots1", DOTS1 | GROUPS),
    "dots1-window": ("dots1", DOTS1 | {"sliding_window": 5, "max_window_layers": 1, "norm_topk_prob": False}),
    "glm4_moe": ("glm4_moe", DOTS1 | GROUPS | {"attention_bias": True, "use_qk_norm": True}),
    "glm4_moe-no-norm": ("glm4_moe", DOTS1 | {"partial_rotary_factor": 0.25, "head_dim": 16}),
    "glm4_moe-yarn": (
        "glm4_moe",
        DOTS1 | {"n_routed_experts": 6, "rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    ),
    "glm4_moe-as-dots1": ("glm4_moe", DOTS1 | {"partial_rotary_factor": 1.0, "use_qk_norm": True}),
    "ernie4_5_moe": ("ernie4_5_moe", ERNIE | {"moe_num_shared_experts": 2, "moe_layer_start_index": 0}),
    "ernie4_5_moe-ends": (
        "ernie4_5_moe",
        ERNIE | {"num_hidden_layers": 4, "moe_layer_end_index": 2, "moe_num_shared_experts": 0, "moe_norm_min": 0.4},
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS | {"rope_parameters": YARN | {"truncate": False}}),
    "gpt_oss-plain": (
        "gpt_oss",
        GPT_OSS
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "attention_bias": False}
        | {"layer_types": ["full_attention"] * 3},
    ),
}


class Asked(NamedTuple):
    """What is measured."""

    device: torch.device
    n_variants: int  # of a family, at most


def settings(device: torch.device, full: bool, rounds: int) -> Asked:
    """All variants, or the first of every family. Nothing is timed: `rounds` is not read."""
    return Asked(device, len(VARIANTS) if full else 1)


def cases(asked: Asked) -> Iterator[Case]:
    """A case per family that has variants."""
    for family in FAMILIES:
        names = [name for name, (of, _) in VARIANTS.items() if of == family][: asked.n_variants]
        key = {"suite": "families", "family": family, "variants": len(names)}
        if importlib.util.find_spec("transformers") is None:
            yield absent(key, "transformers is not installed: pip install 'moe-switchyard[bench]'")
        elif names:
            yield Case(key, functools.partial(measured, names, asked.device))


def measured(names: list[str], device: torch.device) -> dict[str, Any]:
    """The worst of these variants, and the versions compared."""
    import transformers  # here, because it is not everywhere

    transformers.utils.logging.disable_progress_bar()
    told = [compared(name, device) for name in names]
    errors = {name: error for variant in told for name, error in variant["gradients"].items()}
    worst = max(errors, key=lambda name: max(variant["gradients"].get(name, 0.0) for variant in told))
    return {
        "logits_error": max(variant["logits_error"] for variant in told),
        "gradient_error": max(max(variant["gradients"].values()) for variant in told),
        "worst_gradient": worst,
        "n_gradients": sum(len(variant["gradients"]) for variant in told),
        "alike": sum(variant["alike"] for variant in told),
        "generated": NEW * len(names),
        "transformers": transformers.__version__,
    }


def compared(variant: str, device: torch.device) -> dict[str, Any]:
    """Errors of one variant's logits and gradients, and how many generated tokens come before the first other one."""
    tokens_BS = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)
    hf = theirs(variant).to(device)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        model = load(Path(folder)).to(device)
    # Forward and backward of the same loss.
    logits_BSV, ours_BSV = hf(tokens_BS).logits, model(tokens_BS).logits_BSV
    for logits in (logits_BSV, ours_BSV):
        next_token_loss(logits, tokens_BS).backward()
    expected = {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    mapped = to_hf(gradients, model.cfg, VARIANTS[variant][0], stacked=True)
    assert mapped.keys() == expected.keys(), f"{variant}: other weights have gradients"
    # The most probable token, again and again.
    hf.eval().generation_config.eos_token_id = None
    prompt_BS = tokens_BS[:1, :4]
    theirs_S = hf.generate(prompt_BS, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    ours_S = list(generate(model.eval(), prompt_BS[0].tolist(), NEW, temperature=0, eot=-1))
    same = [ours == of_theirs for ours, of_theirs in zip(ours_S, theirs_S, strict=True)]
    return {
        "logits_error": relative_error(ours_BSV, logits_BSV),
        "gradients": {name: relative_error(mapped[name], expected[name]) for name in expected},
        "alike": [*same, False].index(False),
    }


def next_token_loss(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """The mean cross-entropy of a text's own next tokens."""
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())


def theirs(variant: str) -> Any:
    """A tiny random model of transformers whose every weight, norms and biases too, matters to the logits."""
    import transformers  # here, because it is not everywhere

    model_type, settings = VARIANTS[variant]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **settings), dtype=torch.float32
    ).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.25 * noise if p.dim() > 1 or name.endswith("bias") else 1 + 0.3 * noise)
            if name.endswith("e_score_correction_bias"):
                p.mul_(0.1)
        for name, buffer in model.named_buffers():  # above 0: see moe/convert/hf_latent.py
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.15 * torch.randn(buffer.shape, generator=generator).abs())
    return model


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of a row."""
    head = row["family"], str(row["variants"])
    if row["status"] != "measured":
        return *head, row["status"], "", "", row["error"][:60]
    errors = f"{row['logits_error']:.1e}", f"{row['gradient_error']:.1e}"
    return *head, *errors, f"{row['n_gradients']}", f"{row['alike']} of {row['generated']}"
