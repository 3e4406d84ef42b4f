"""What an expert computes of its operands, beside their values: z = x @ w_up^T + b_up, h = act(z), y = h @ w_down^T +
b_down, and a token's output is the sum of w y over its rows.
"""

import math
from typing import NamedTuple

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu2")
ROUNDED = ("", "activations", "all")


class Form(NamedTuple):
    """The kind of an expert. swiglu has two columns of z for one of h, a gate g and another u, and is
    g · sigmoid(alpha g) · (u + shift), with g cut off above `limit` and u beyond ± `limit`."""

    # swiglu (Shazeer 2002.05202) | gelu (exact) | gelu_tanh (GPT-2's approximation) | relu2 (squared ReLU, 2109.08668)
    activation: str
    interleaved: bool = False  # w_up's rows are gate 0, u 0, gate 1, u 1, ...; else all gates, then all u
    alpha: float = 1.0
    limit: float = 0.0  # 0: none
    shift: float = 0.0
    weigh_input: bool = False  # a row's weight multiplies what enters its expert (Llama 4), not what leaves it
    fp8: str = ""  # what is rounded to 8 bits before it is multiplied (kernels.fp8): "" | activations | all

    @property
    def gated(self) -> bool:
        """Whether z has two columns for one of h."""
        return self.activation == "swiglu"

    def width(self, f: int) -> int:
        """Columns of z for `f` of h."""
        return 2 * f if self.gated else f

    def check(self) -> "Form":
        """Itself. Raises `ValueError` for what no expert computes, naming it and what would be accepted."""
        if self.activation not in ACTIVATIONS:
            accepted = ", ".join((*ACTIVATIONS, *NAMED))
            raise ValueError(f"activation={self.activation!r} is not one of {accepted}.")
        if not self.gated and self._replace(weigh_input=False, fp8="") != Form(self.activation):
            raise ValueError(
                f"activation={self.activation} has no gate: interleaved, alpha, limit and shift are swiglu's alone; "
                f"they are {self.interleaved}, {self.alpha}, {self.limit}, {self.shift}."
            )
        if self.fp8 not in ROUNDED:
            raise ValueError(f"fp8={self.fp8!r} is not one of {', '.join(map(repr, ROUNDED))}.")
        if not (abs(self.alpha) < math.inf and abs(self.shift) < math.inf and 0 <= self.limit < math.inf):
            raise ValueError(
                f"swiglu takes a finite alpha and shift, and a finite limit of 0 (none) or more; they are "
                f"{self.alpha}, {self.shift}, {self.limit}."
            )
        return self


# Of gpt-oss (2508.10925).
NAMED = {"swiglu_clipped": Form("swiglu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0)}


def form_of(given: Form | str) -> Form:
    """A form, or the one of this name: an activation with everything else as it is by default. Raises `ValueError`."""
    if isinstance(given, Form):
        return given.check()
    return NAMED.get(given) or Form(given).check()
