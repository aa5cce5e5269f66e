"""The SVFit layer: `y = W x + U (delta * (Vh x))` around a linear layer whose `W` stays."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError, TargetError, warn
from ...layouts import execution_device
from ...starts import LINEAR_KINDS, is_quantized, linear_shape, linear_weight


class SVFitLinear(nn.Module, BaseTunerLayer):
    """A linear layer with any number of spectral adapters, summed when several are active.

    The bases are frozen parameters rather than buffers, since DDP would broadcast buffers before
    every forward pass, and FSDP and ZeRO would keep a whole copy of them on every rank. "Linear" in
    the name of the class is how PEFT finds adapted layers for `"all-linear"`.

    Attributes:
        svfit_delta: `(r,)` by adapter name, float32, the only trainable numbers.
        svfit_U: `(out, r)` by adapter name, float32, frozen.
        svfit_Vh: `(r, in)` by adapter name, float32, frozen.
        weight_hash: `layouts.weight_hash` of the weight that the basis is from.
        largest: singular value of that weight, by adapter name, which the learning rate depends on.
    """

    adapter_layer_names = ("svfit_delta",)
    other_param_names = ("svfit_U", "svfit_Vh", "weight_hash", "largest")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = linear_shape(base_layer) or (0, 0)
        self.svfit_delta = nn.ParameterDict()
        self.svfit_U = nn.ParameterDict()
        self.svfit_Vh = nn.ParameterDict()
        self.weight_hash: dict[str, str] = {}
        self.largest: dict[str, float] = {}
        self.merged_adapters = []
        self._active_adapter = []

    @property
    def r(self) -> dict[str, int]:
        """Ranks by adapter name."""
        return {name: len(delta) for name, delta in self.svfit_delta.items()}

    def add_adapter(self, adapter_name: str, r: int) -> None:
        """Add an adapter of rank `r`, at most `min(out, in)`, whose basis `fill` will write."""
        device = execution_device(self.get_base_layer())
        shapes = {"svfit_U": (self.out_features, r), "svfit_Vh": (r, self.in_features)}
        for name, shape in shapes.items():
            value = torch.zeros(shape, dtype=torch.float32, device=device)
            _put(getattr(self, name), adapter_name, nn.Parameter(value, requires_grad=False))
        delta = torch.zeros(r, dtype=torch.float32, device=device)
        _put(self.svfit_delta, adapter_name, nn.Parameter(delta))

    @torch.no_grad()
    def fill(self, adapter_name: str, U: Tensor, Vh: Tensor) -> None:
        """Write the basis `U (out, r)` and `Vh (r, in)` of an adapter."""
        self.svfit_U[adapter_name].copy_(U)
        self.svfit_Vh[adapter_name].copy_(Vh)

    def base_matrix(self) -> Tensor:
        """`W` as `(out, in)`, float32, dequantised if need be; shares memory where it can."""
        return linear_weight(self.get_base_layer())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update `U diag(delta) Vh` of the weight, `(out, in)`; transposed for `Conv1D`."""
        delta = (self.svfit_U[adapter] * self.svfit_delta[adapter]) @ self.svfit_Vh[adapter]
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer on `x (..., in)` and add the active adapters.

        The result `(..., out)` has the dtype of the base layer's; sums are taken in the adapter's.

        Raises:
            TargetError: if the base layer returns something else than a tensor.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if not isinstance(result, Tensor):
            base = type(self.get_base_layer()).__name__
            raise TargetError(
                f"a {base} returns a {type(result).__name__} where a linear layer returns a "
                "tensor, so it cannot have an adapter; add its name to exclude_modules."
            )
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.svfit_delta:
                result = result + self._update(x, name)
        return result.to(dtype)

    def _update(self, x: Tensor, name: str) -> Tensor:
        U, delta, Vh = self.svfit_U[name], self.svfit_delta[name], self.svfit_Vh[name]
        x = self._cast_input_dtype(x, Vh.dtype)
        return nn.functional.linear(nn.functional.linear(x, Vh) * delta, U)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters, by default the active ones, to the base weight, rounded to its dtype.

        Raises:
            ValueError: if a result is not finite, which `safe_merge` checks before writing it.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.svfit_delta:
                continue
            merged = self._shifted(name, 1)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(
                    f"merging adapter {name!r} gives weights that are not finite; the adapter is "
                    "broken, load an earlier checkpoint."
                )
            self.weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged adapters; exact up to rounding in the base weight's dtype."""
        if not self.merged:
            warn("no adapter is merged, there is nothing to unmerge.")
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.svfit_delta:
                self.weight.data = self._shifted(name, -1)

    @torch.no_grad()
    def _shifted(self, adapter_name: str, sign: int) -> Tensor:
        if is_quantized(self.get_base_layer()):
            raise ConfigError(
                f"a {type(self.get_base_layer()).__name__} cannot take in an adapter without being "
                "quantised anew, which may round it away; merge it into the unquantised model: "
                "save the adapter and load it there with PeftModel.from_pretrained."
            )
        weight = self.weight.data
        return (weight + sign * self.get_delta_weight(adapter_name)).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive, so PEFT may convert it to LoRA."""
        return True

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's method would cast the adapter to the dtype of a half-precision base.
        device = device or execution_device(self.get_base_layer())
        for parameters in (self.svfit_delta, self.svfit_U, self.svfit_Vh):
            if adapter_name in parameters:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)

    def __repr__(self) -> str:
        return "svfit." + super().__repr__()


def checked_shape(name: str, module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a targeted module's weight; `TargetError` if it is no linear layer."""
    shape = linear_shape(module)
    if shape is None:
        raise TargetError(
            f"SVFit adapts linear layers ({LINEAR_KINDS}), but target_modules matches {name}, a "
            f"{type(module).__name__}; add it to exclude_modules."
        )
    return shape


def _put(parameters: nn.ParameterDict, adapter_name: str, value: nn.Parameter) -> None:
    """Add a parameter with its values, though Accelerate's `init_empty_weights` would drop them.

    PEFT builds a whole model under it for `low_cpu_mem_usage`; a basis cannot be computed there.
    """
    parameters[adapter_name] = value
    if parameters[adapter_name].is_meta and not value.is_meta:
        parameters._parameters[adapter_name] = value
