"""The contract between routers and what follows them: what a router is given, and what it decides.

A router is `router(x_TD, backend, context) -> Routing` and decides who goes where and with what weight, nothing else.
What it decides is rows: (token, expert, weight). Everything behind it (capacity, plan, experts, combine, losses,
metrics) reads rows and scores, and never asks which router they came from.

Letters beyond the glossary: P slots that a soft router gives an expert in every sequence.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from kernels import reference
from moe.config.balance import SCHEDULED, BalanceConfig
from moe.config.model import MoEConfig
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.parallel.collectives import Ranks

# Instead of an expert's number. Both add nothing to the output, and every backend takes any negative number for them.
DROPPED = -1  # the row wanted an expert and got none: capacity. Counted as dropped
UNUSED = -2  # no expert by design: fewer than K were wanted

# What a loss of a router's own cannot be called, as a step's line has them all flat: the balance's terms, other parts'
# losses, and what else stands in the line (`moe.run.summary.MetricsLine`).
TAKEN = (
    *SCHEDULED, "default", "depth", "lm", "distill", "step", "seconds", "loss", "lm_loss", "losses", "grad_norm", "lr",
    "tokens_per_s", "skipped", "layers", "alarms", "val", "answers", "reward", "dpo", "grpo",
)  # fmt: skip
# What layers and depth routers observe by these names
OBSERVED = ("count", "importance", "prob", "smooth", "depth_cutoff", "depth_sequences")


class Step(NamedTuple):
    """The optimiser step that a batch is one of `parts` equal parts of, in one MoE layer.

    With balance.scope=global the parts are the micro-batches of every rank, and `sums` are what losses are computed
    from, summed over the whole step: "count", the rows wanted of every expert, and what routers and layers `observed`.
    With None they are the `ranks` that share this micro-batch, and losses are of it alone."""

    parts: int = 1
    sums: dict[str, Tensor] | None = None
    ranks: Ranks = Ranks()

    def total(self, name: str, batch_sum: Tensor) -> Tensor:
        """The sum over all parts in value, the batch's own (times `parts`) in gradient: so the mean over the parts of
        any function of it has the value and the gradient of that function of one big batch. `batch_sum` where there is
        one part."""
        if self.sums is None and self.parts == 1:
            return batch_sum
        whole = self.ranks.summed(batch_sum) if self.sums is None else self.sums[name].to(batch_sum.dtype)
        return whole + self.parts * (batch_sum - batch_sum.detach())

    def tokens(self, n_tokens: int) -> int:
        """How many tokens `total` is a sum over, `n_tokens` being the batch's."""
        return self.parts * n_tokens


class Context(NamedTuple):
    """What a router may know of a batch beside its states. T = n_sequences · S, sequence after sequence."""

    tokens_T: Tensor | None = None  # token ids
    n_sequences: int = 1
    step: Step = Step()


class Routing(NamedTuple):
    """A router's decision, in routed rows, in token order.

    With a fixed number of rows per token, expert and weight are (T, K) and `token_N` is None: row t·K + j is token t's.
    Ragged families give rows (N,) and the token of each, ascending. A negative expert is none: `DROPPED` or `UNUSED`.

    Routers whose choice has no scores (hash) leave logits, lse and prob None; a balance term that reads them is refused
    by `moe.config.router`."""

    expert: Tensor  # (T, K) or (N,) int64
    weight: Tensor  # same shape, float
    token_N: Tensor | None  # (N,) int64, ascending
    logits_TE: Tensor | None = None
    lse_T: Tensor | None = None  # log-sum-exp of a token's logits
    prob_E: Tensor | None = None  # probabilities (scores that sum to 1 for every token), summed over the tokens
    score: str = "softmax"  # how logits become scores: softmax | sigmoid | sqrt_softplus | relu
    rest_TE: Tensor | None = None  # weights of the experts a token did not take, for their default vectors
    # The router's own, scalars, each weighted by 1 whatever it is called: the router multiplies with its coefficient.
    # Names of the balance's terms and of what else a step's line has (`TAKEN`) are refused
    losses: dict[str, Tensor] | None = None
    # what `Router.update` learns from and `Step.total` knows; summed over micro-batches
    observed: dict[str, Tensor] | None = None
    smooth_E: Tensor | None = None  # expected rows of every expert, were its noise drawn again: what balance.load reads

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token_N, expert_N, weight_N), whatever the family."""
        return rows(self.token_N, self.expert, self.weight)

    def prob_TE(self) -> Tensor:
        """Every token's probabilities, (T, E), rows summing to 1; `prob_E` is their sum. Needs logits."""
        assert self.logits_TE is not None, "a router without scores has no probabilities"
        return probabilities(self.logits_TE, self.score)


class Mixture(NamedTuple):
    """What a soft router decides instead of rows: every expert reads P slots of each sequence, a slot being a weighted
    mean of its tokens, and every token reads a weighted mean of all slots (Soft MoE, 2308.00951). B sequences."""

    dispatch_BSEP: Tensor  # sums to 1 over S
    combine_BSEP: Tensor  # sums to 1 over (E, P)


class Router(nn.Module):
    """What every router shares. A subclass overrides `forward`, and says in its class attributes what it is.

    One router is made per MoE layer: `layer` is its number among all layers, `moe` that layer's own settings,
    `d_model` = D, `vocab_size` the number of token ids, `context` = S, the longest sequence. The weight of a linear
    router is `w_ED`."""

    causal = True  # in training: a token's routing depends on no later token
    causal_in_eval = True  # the same in evaluation, where routers that balance a batch must decide alone
    per_token = True  # a token's routing in evaluation depends on that token alone
    fixed_k = True  # every token takes exactly K distinct experts in evaluation
    smooth = True  # where the choice does not change, the output is differentiable and gradients are its derivative

    def __init__(
        self,
        cfg: RouterConfig,
        d_model: int,
        moe: MoEConfig,
        *,
        layer: int = 0,
        vocab_size: int = 0,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.cfg, self.k, self.layer = cfg, moe.k, layer
        self.n_experts = moe.n_experts + moe.n_cheap

    def forward(self, x_TD: Tensor, backend: str, context: Context) -> Routing | Mixture:
        """(T, D) -> the decision. `backend` is reference, torch or triton. `self.training` says whether to explore."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, balance: BalanceConfig, rate: float, count_E: Tensor, observed: dict[str, Tensor]) -> None:
        """Once after every optimiser step: `count_E` are the step's routed rows, `observed` what its forward passes
        gave, both summed over micro-batches; `rate` is the bias step of this moment. Nothing, unless overridden."""


def check_names(losses: dict[str, Tensor], observed: dict[str, Tensor], router: str) -> None:
    """Raise `BadInput` where what the router called `router` gives of its own has a name that is not free."""
    for name in losses:
        if name in TAKEN:
            whose = f"balance.{name}'s" if name in SCHEDULED else "another number's of the same step"
            raise BadInput(
                f"router.name={router} gives a loss named {name}, which is {whose}: give it another name; a router's "
                "own losses are weighted by 1, so multiply it with its coefficient there."
            )
    for name in observed:
        if name in OBSERVED:
            raise BadInput(
                f"router.name={router} observes {name}, which is what the layer observes by that name: give it another."
            )


def rows(token_N: Tensor | None, expert: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Routed rows (token_N, expert_N, weight_N) from either form of a routing."""
    if token_N is not None:
        return token_N, expert, weight
    n_tokens, k = expert.shape
    token_N = torch.arange(n_tokens, device=expert.device).repeat_interleave(k)
    return token_N, rearrange(expert, "t k -> (t k)"), rearrange(weight, "t k -> (t k)")


def probabilities(logits_TE: Tensor, score: str) -> Tensor:
    """Scores that sum to 1 for every token: (T, E) -> (T, E)."""
    score_TE = logits_TE.relu() if score == "relu" else reference.scores(logits_TE, score)
    if score == "softmax":
        return score_TE
    return score_TE / score_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(score_TE.dtype).tiny)
