r"""LoRA-One's preconditioned step: one-step full gradient suffices for low-rank fine-tuning.

Zhang, Liu & Chen (2025), ICML, https://arxiv.org/abs/2502.01235. The start is `methods.lora_one`.

| in the paper | here |
|---|---|
| `B - eta g_B (A A^T)^-1`, `A - eta (B^T B)^-1 g_A`, Algorithm 1, lines 7-9, Eq. 9 | `preconditioned`, `mode="gd"` |
| the same gradients in AdamW, as the experiments had it | `preconditioned`, `adam.adam_directions`, `mode="adamw"` |

Gradient descent so preconditioned moves the product by `-eta g` projected on the factors' spaces,
however the product is split: this is what the paper's theorems are about. AdamW divides every entry
by its own size afterwards, which takes most of the preconditioning away again.

**Departures from the authors' code**, a file that they deleted in May 2025 and have not replaced.

1. Both factors step from the old pair. Theirs changes `A` in place first, and `B` is preconditioned
   with the new one.
2. Adam's moments are corrected for their start at zero; theirs are not, and the first step is 3.16
   times as large.
3. The dampening is relative to the Gram matrix, and an option; theirs is 1e-6,
   whatever the factors' size.
4. A factor that cannot be inverted is never passed over in silence: theirs falls back to the plain
   gradient, in bfloat16 always. While a factor is zero, the other one stands still.
5. The gradients are those of PEFT's factors, with `s = alpha / r` inside, as the authors have it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from .adam import ADAM, adam_directions, check_adam, stepped
from .base import PairOptimizer
from .options import Common
from .stacks import Layout, Stack
from .whitening import gram_power

if TYPE_CHECKING:
    from typing_extensions import Unpack

Mode = Literal["adamw", "gd"]


class LoraOne(PairOptimizer):
    """Preconditioned gradient descent, or AdamW on preconditioned gradients.

    Args:
        model: the model with the adapter; the paper starts it with `LoraOneConfig`.
        mode: `"gd"`, what the theory is about, or `"adamw"`, as the text has it. Without a state,
            `"gd"` has none to load: torch refuses a full state dict under FSDP2, as it does for SGD.
        betas: decay of Adam's moments.
        eps: added to the root of Adam's second moment.
        dampening: fraction of the norm added to the Gram matrices.
        **common: see `Common`. Both factors shrink by `1 - lr * weight_decay`.

    Raises:
        ConfigError: if an option has no meaning, or the model no pairs.
    """

    name: ClassVar[str] = "lora_one"
    title: ClassVar[str] = "LoRA-One"
    paper: ClassVar[str] = "2502.01235"

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: Mode = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        dampening: float = 1e-6,
        **common: "Unpack[Common]",
    ) -> None:
        given = {"mode": mode, "betas": betas, "eps": eps, "dampening": dampening}
        super().__init__(model, given, **common)

    def check(self, options: Mapping[str, Any]) -> None:  # noqa: D102
        check_adam(self.title, Mode, options)

    def layouts(self, options: Mapping[str, Any]) -> dict[str, Layout]:  # noqa: D102
        return ADAM if options["mode"] == "adamw" else {}

    def update(  # noqa: D102
        self, stack: Stack, state: dict[str, Tensor], options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        directions = preconditioned(stack, options["dampening"])
        if options["mode"] == "adamw":
            directions = adam_directions(stack, directions, state, options)
        return stepped(stack, directions, options)


def preconditioned(
    stack: Stack, dampening: float
) -> tuple[Float[Tensor, "n r in"], Float[Tensor, "n out r"]]:
    """`(B^T B)^-1 g_A` and `g_B (A A^T)^-1`; zero where the factor to invert is zero."""
    dA = gram_power(stack.B, -1.0, dampening) @ stack.gA
    dB = stack.gB @ gram_power(stack.A.mT, -1.0, dampening)
    return dA, dB
