"""The decoder-only transformer, dense or Mixture-of-Experts, read top to bottom: initialisation, block, model, loss.

tokens (B, S) -> embedding (+ learned positions) -> L blocks of norms, attention and MLP or MoE -> norm -> logits.
Letters beyond the glossary: d channels of a head and J tokens of a sequence that enter a block, as in attention.py and
depth.py.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config.balance import BalanceConfig
from moe.config.model import ModelConfig, layer_moe, moe_layers, window_of
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.model.attention import Attention, KVCache, within_documents, within_window
from moe.model.depth import DepthRouter
from moe.model.experts import MLP, Experts
from moe.model.latent import LatentAttention
from moe.model.layer import LayerInput, LayerRouting, MoELayer
from moe.model.rope import rotary
from moe.routing.contract import Router, Step

# What starts at 0: biases, sinks and default vectors.
ZERO = ("bias", "bias_E", "bias_EF", "bias_ED", "sinks", "default_ED")


class Output(NamedTuple):
    """What a forward pass returns: logits and, for every MoE layer in order, what its router did."""

    logits_BSV: Tensor
    routing: list[LayerRouting]


def norm(cfg: ModelConfig) -> nn.Module:
    """The norm over D that the config names."""
    if cfg.norm == "rms":
        return nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), the MLP dense or routed; where it has a depth router, for some
    tokens only. With norm_at=after, x + norm(attention(x)) and x + norm(mlp(x))."""

    def __init__(self, cfg: ModelConfig, router: RouterConfig, balance: BalanceConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.residual_scale = layer, window_of(cfg, layer), cfg.residual_scale
        self.norm_first = cfg.norm_at == "before"
        self.attn_norm = norm(cfg)
        self.attn = Attention(cfg) if cfg.latent is None else LatentAttention(cfg)
        self.mlp_norm = norm(cfg)
        routed = moe_layers(cfg)
        self.mlp: MoELayer | MLP
        self.depth: DepthRouter | None = None
        if layer in routed:
            own_router, moe = not router.shared or layer == routed[0], layer_moe(cfg, layer)
            self.mlp = MoELayer(cfg, moe, router, balance, layer, own_router)
            if moe.depth < 1:
                self.depth = DepthRouter(cfg.d_model, moe)
        else:
            self.mlp = MLP(cfg, cfg.d_ff)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        backend: str,
        cache: KVCache | None,
        layer_input: LayerInput = LayerInput(),  # noqa: B008 — immutable
        mask: Tensor | None = None,
    ) -> tuple[Tensor, LayerRouting | None]:
        if self.depth is None:
            return self.feed(self.attend(x_BSD, rope, cache, mask=mask), backend, layer_input)
        entry, (b, s, d) = self.depth(x_BSD), x_BSD.shape
        if self.training:  # as many tokens of every sequence: they are a batch of shorter sequences
            assert cache is None, "in training a whole sequence decides together who enters: no cache"
            place_BJ = entry.token_I.view(b, -1) % s
            row_B1 = torch.arange(b, device=x_BSD.device)[:, None]
            if rope is not None:
                cos, sin = (angles.expand(b, 1, s, -1)[row_B1, 0, place_BJ][:, None] for angles in rope)
                rope = cos, sin
            if mask is not None:
                mask = mask.expand(b, 1, s, s)[row_B1[:, :, None], 0, place_BJ[:, :, None], place_BJ[:, None]][:, None]
            h_BSD = self.attend(entry.take(x_BSD).view(b, -1, d), rope, None, mask=mask)
        else:
            enters_BS = torch.zeros(b * s, dtype=torch.bool, device=x_BSD.device).index_fill(0, entry.token_I, True)
            h_BSD = entry.take(self.attend(x_BSD, rope, cache, enters_BS.view(b, s), mask))[None]
        y_BSD, report = self.feed(h_BSD, backend, entry.narrow(layer_input))
        assert report is not None, "only MoE layers have a depth router"
        return entry.put(x_BSD, y_BSD.flatten(0, 1)), entry.report(report, b * s)

    def attend(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        keys_BS: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x + attention(norm(x))."""
        h_BSD = self.attn_norm(x_BSD) if self.norm_first else x_BSD
        y_BSD = self.attn(h_BSD, rope, self.layer, cache, keys_BS, mask)
        return self.add(x_BSD, y_BSD if self.norm_first else self.attn_norm(y_BSD))

    def feed(self, x_BSD: Tensor, backend: str, layer_input: LayerInput) -> tuple[Tensor, LayerRouting | None]:
        """x + mlp(norm(x)), and what the router did, if there is one."""
        h_BSD, report = self.mlp_norm(x_BSD) if self.norm_first else x_BSD, None
        if isinstance(self.mlp, MoELayer):
            y_BSD, report = self.mlp(h_BSD, backend, layer_input)
        else:
            y_BSD = self.mlp(h_BSD)
        return self.add(x_BSD, y_BSD if self.norm_first else self.mlp_norm(y_BSD)), report

    def add(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        """x + y, y scaled where the model says so (Granite)."""
        return x_BSD + (y_BSD if self.residual_scale == 1 else y_BSD * self.residual_scale)


class Transformer(nn.Module):
    """A decoder-only language model: tokens (B, S) int64 -> `Output` with logits (B, S, V).

    Weights are uninitialised until `initialize` or a checkpoint fills them. `cfg.vocab_size` must be set. Where there
    is a `document_end`, a token attends to its own document alone, in which its position is counted; that token ends
    each one (data.documents=separate). `reward`: with a head that gives a text a number, beside the one of tokens."""

    cos_Sd: Tensor
    sin_Sd: Tensor

    def __init__(
        self,
        cfg: ModelConfig,
        router: RouterConfig,
        balance: BalanceConfig | None = None,
        document_end: int | None = None,
        reward: bool = False,
    ) -> None:
        super().__init__()
        self.cfg, self.router, self.document_end = cfg, router, document_end
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        if cfg.position == "learned":
            self.position = nn.Embedding(cfg.context, cfg.d_model)
        else:
            cos_Sd, sin_Sd = rotary(cfg)
            self.register_buffer("cos_Sd", cos_Sd, persistent=False)
            self.register_buffer("sin_Sd", sin_Sd, persistent=False)
        self.blocks = nn.ModuleList(
            Block(cfg, router, balance or BalanceConfig(), layer) for layer in range(cfg.n_layers)
        )
        self.norm = norm(cfg)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.reward = nn.Linear(cfg.d_model, 1, bias=False) if reward else None

    def forward(self, tokens_BS: Tensor, **settings: Any) -> Output:
        """Logits of the next token at every place; `settings` as in `states`."""
        x_BSD, routing = self.states(tokens_BS, **settings)
        return Output(divided(self.cfg, self.head(x_BSD)), routing)

    def rewards(self, x_BSD: Tensor, last_B: Tensor) -> Tensor:
        """What a reward model (objective.name=reward) gives every row, read up to place `last_B`: (B, S, D) of
        `states`, (B,) -> (B,)."""
        assert self.reward is not None, "a model without a reward head gives no rewards"
        row_B = torch.arange(len(last_B), device=last_B.device)
        return self.reward(x_BSD[row_B, last_B])[:, 0]  # type: ignore[no-any-return]

    def states(
        self,
        tokens_BS: Tensor,
        *,
        backend: str = "torch",
        cache: KVCache | None = None,
        checkpoint_activations: bool = False,
        steps: Sequence[Step] | None = None,
        recorded: Sequence[Tensor] | None = None,
        watched: bool = False,
    ) -> tuple[Tensor, list[LayerRouting]]:
        """The states that logits are made of, (B, S, D), and what the routers did.

        With a `cache`, `tokens_BS` continue what it holds. `checkpoint_activations` keeps only the blocks' inputs
        for backward and computes the rest again. For every MoE layer in order, `steps` are the whole optimiser step
        (for balance.scope=global), and `recorded` the experts (T, K) to take instead of the router's choice, as an
        earlier pass returned them in `LayerRouting.expert`. `watched`: also say how decided the routers are."""
        past = cache.length if cache is not None else 0
        end = past + tokens_BS.shape[1]
        if end > self.cfg.context:
            raise ValueError(f"{end} positions exceed model.context={self.cfg.context}")
        # Positions: in the window, or in each document. Every target counts, also the first of a document, predicted
        # from the end of the one before.
        place: slice | Tensor = slice(past, end)  # or (B, S)
        mask = None
        if self.document_end is not None:
            read_BS = tokens_BS if cache is None else cache.read(tokens_BS)
            place_BS, mask = within_documents(read_BS, self.document_end)
            place, mask = place_BS[:, past:], mask[:, :, past:]
        windowed = within_window(past, end, self.cfg.window, tokens_BS.device, mask)
        # Embed; positions are added here, or turn queries and keys in every block.
        x_BSD, rope = self.embedded(tokens_BS), None
        if self.cfg.position == "learned":
            x_BSD = x_BSD + self.position.weight[place]
        else:  # (1, S, d) or (B, 1, S, d), for every head
            rope = self.cos_Sd[place].unsqueeze(-3), self.sin_Sd[place].unsqueeze(-3)
        # The blocks. An MoE layer is given more than its states, and tells what its router did.
        routing: list[LayerRouting] = []
        tokens_T = tokens_BS.flatten()
        shared = self.routers()[0] if self.router.shared and self.cfg.moe else None
        for block in self.blocks:
            layer_input = LayerInput()
            if isinstance(block.mlp, MoELayer):
                n_before = len(routing)  # MoE layers
                layer_input = LayerInput(
                    tokens_T=tokens_T,
                    previous_TD=routing[-1].state_TD if routing else None,
                    router=shared,
                    step=steps[n_before] if steps is not None else Step(),
                    recorded_TK=recorded[n_before] if recorded is not None else None,
                    watched=watched,
                )
            arguments = (x_BSD, rope, backend, cache, layer_input, windowed if block.window else mask)
            if checkpoint_activations:
                x_BSD, report = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BSD, report = block(*arguments)
            if report is not None:
                routing.append(report)
        # The states behind the last block.
        if cache is not None:
            cache.length = end
        return self.norm(x_BSD), routing

    def embedded(self, tokens_BS: Tensor) -> Tensor:
        """What enters the first block, positions apart: (B, S) -> (B, S, D)."""
        x_BSD = self.embed(tokens_BS)
        return x_BSD if self.cfg.embed_scale == 1 else x_BSD * self.cfg.embed_scale

    def routers(self) -> list[Router]:
        """The router of every MoE layer, in order: one and the same where it is shared."""
        layers = [block.mlp for block in self.blocks if isinstance(block.mlp, MoELayer)]
        return [layer.router or layers[0].router for layer in layers]  # type: ignore[misc]

    def depths(self) -> list[DepthRouter | None]:
        """The depth router of every MoE layer, in order; None where every token enters."""
        return [block.depth for block in self.blocks if isinstance(block.mlp, MoELayer)]  # type: ignore[misc]

    @torch.no_grad()
    def initialize(self, seed: int) -> "Transformer":
        """Fill every weight from N(0, init_std²), with two exceptions: norms and gains are 1, biases and default
        vectors 0, and what writes to the residual stream (attention's `o`, every `down`) has its deviation divided by
        sqrt(2L), so that the stream's variance does not grow with depth (GPT-2).

        Each tensor's draw depends on (seed, its name) alone. So a model and its dense twin share the weights they have
        in common, and adding a layer moves no other weight."""
        for name, p in self.named_parameters():
            if p.dim() < 2 or name.endswith(ZERO):
                p.fill_(0.0 if name.endswith(ZERO) else 1.0)
                continue
            residual = name.endswith(("attn.o.weight", "down.weight", "w_down_EDF"))
            std = self.cfg.init_std / (math.sqrt(2 * self.cfg.n_layers) if residual else 1.0)
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))
        return self


def divided(cfg: ModelConfig, logits_BSV: Tensor) -> Tensor:
    """What the output map gives as logits: divided by a constant, where the model has one (Granite)."""
    return logits_BSV if cfg.logit_divisor == 1 else logits_BSV / cfg.logit_divisor


def hidden_matrices(model: Transformer) -> dict[str, int]:
    """The names of the weights between embeddings and output head that are matrices or stacks of them (attention's, of
    dense and shared MLPs, of routed experts; no router's), and of how many that lie below one another in its rows each
    matrix consists: two where swiglu's gate lies on the up projection."""
    names = {}
    for prefix, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, Attention | LatentAttention | MLP | Experts):
            gated = isinstance(module, MLP | Experts) and module.form.gated and not module.form.interleaved
            for name, p in module.named_parameters():
                if p.dim() >= 2 and not name.endswith(ZERO):
                    names[f"{prefix}.{name}"] = 2 if gated and name in ("up.weight", "w_up_EFD") else 1
    return names


def next_token_loss(logits_BSV: Tensor, targets_BS: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats per token, in float32 at least; reduction "none" keeps (B, S). A target of −1 counts
    nothing."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    logits_TV = logits_BSV.flatten(0, 1).to(dtype)
    loss = F.cross_entropy(logits_TV, targets_BS.flatten(), reduction=reduction, ignore_index=-1)
    return loss.view(targets_BS.shape) if reduction == "none" else loss


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a tied weight once."""
    state = model.state_dict()
    if model.cfg.tie_embeddings:
        del state["head.weight"]
    return state


def load_model(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `model_tensors`. Raises `BadInput` when names or shapes differ."""
    tensors = dict(tensors)
    if model.cfg.tie_embeddings:
        tensors["head.weight"] = tensors["embed.weight"]
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"the checkpoint does not hold this model's weights: {reason}.") from error
