"""Finds the products with parameters that have no linear layer of their own, such as experts.

Mixture-of-experts layers of Transformers keep the weights of all experts in one parameter,
`(experts, out, in)`, and multiply by parts of it: expert by expert, by groups, or by a gathered
copy for each token. There is no layer to hook. So while the module runs, a `TorchFunctionMode`
follows its parameters: it knows which tensors are parts, transposes or copies of one, and observes
every matrix product with them, whichever code computes it. Any other use is an error: if a product
were missed, the gradient would be silently wrong.

Only `forward` of the module is wrapped, as an attribute of the instance, and unwrapped at the end.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakIdKeyDictionary

from ...errors import CalibrationError
from .experts import ExpertWeight, Parameter, Product, parameters_of

Rows = Callable[[Tensor], Tensor]
"""Selects the tokens that count from `(tokens, features)`."""

See = Callable[[Product, Tensor], Tensor]
"""Receives a product and its result, and returns the result that the module is given."""


@dataclasses.dataclass(frozen=True)
class View:
    """Which part of a parameter a tensor is.

    Attributes:
        parameter: the parameter.
        experts: index of the one matrix, indices of a stack of matrices, or `None` for all.
        turned: whether the last two dimensions are exchanged.
    """

    parameter: Parameter
    experts: int | Tensor | None
    turned: bool = False


@contextmanager
def watched(
    weights: Mapping[str, ExpertWeight], see: See, rows: Callable[[], Rows | None] | None = None
) -> Iterator[None]:
    """Call `see` for every product with some matrices while the block runs.

    `rows` is called at each call of a module, and returns the function that selects the tokens that
    count, or `None` if none of them do. Where only some count, the module runs a second time with
    those alone, and only that run is observed. Default: all count.
    """
    modules: dict[int, list[Parameter]] = {}
    for parameter in parameters_of(weights):
        modules.setdefault(id(parameter.module), []).append(parameter)
    wrapped: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for followed in modules.values():
            module = followed[0].module
            own = {k: v for k, v in vars(module).items() if k == "forward"}  # of offloading, say
            wrapped.append((module, own))
            vars(module)["forward"] = _watched_forward(module.forward, followed, see, rows)
        yield
    finally:
        for module, own in wrapped:
            del vars(module)["forward"]
            vars(module).update(own)


def _watched_forward(
    forward: Callable[..., Any],
    followed: list[Parameter],
    see: See,
    rows: Callable[[], Rows | None] | None,
) -> Callable[..., Any]:
    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        selection = rows() if rows else _all_rows
        if selection is None:
            return forward(*args, **kwargs)
        selected = _selected(args, kwargs, selection)
        with _Following(followed, see):
            if selected is None:
                return forward(*args, **kwargs)
            forward(*selected[0], **selected[1])
        return forward(*args, **kwargs)

    return watched_forward


def _all_rows(x: Tensor) -> Tensor:
    return x


def _selected(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows
) -> tuple[list[Any], dict[str, Any]] | None:
    """The arguments with only the tokens that count; `None` if all of them count."""
    values = (*args, *kwargs.values())
    first = next((v for v in values if isinstance(v, Tensor) and v.dim() > 1), None)
    if first is None or rows(first) is first:
        return None
    n_tokens = first.shape[:-1].numel()

    def select(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() > 1 and value.shape[:-1].numel() == n_tokens:
            return rows(value)
        return rows(value[:, None])[:, 0] if value.shape == (n_tokens,) else value

    return [select(v) for v in args], {k: select(v) for k, v in kwargs.items()}


_TURNS = {Tensor.t, torch.t, *(getattr(Tensor, name).__get__ for name in ("T", "mT"))}
_EXCHANGES = {Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes}
_COPIES = {
    *(Tensor.to, Tensor.contiguous, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double),
    *(Tensor.type, Tensor.type_as, Tensor.clone, torch.clone, Tensor.detach, torch.detach),
    getattr(Tensor, "data").__get__,  # noqa: B009 a descriptor, which type checkers do not know
}
_SELECTS = {Tensor.select, torch.select, Tensor.index_select, torch.index_select}
_LOOKS = {torch.zeros_like, torch.ones_like, torch.empty_like}
"""Functions that read only a tensor's dtype, device and shape."""
_UNBINDS = {Tensor.unbind, torch.unbind}
_PRODUCTS = {
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__),
    *(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
}
_GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}


class _Following(TorchFunctionMode):
    """Knows which tensors are parts of a parameter, and calls `see` for products with them."""

    def __init__(self, parameters: list[Parameter], see: See) -> None:
        super().__init__()
        self.parameters = parameters
        self.see = see
        self.views = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        first = self._view(args[0]) if args else None
        # `x.to(weight)` reads the dtype and device of the weight alone as well.
        if func in _LOOKS or (func in _COPIES and first is None):
            return result
        operands = [*args, *kwargs.values()]
        operands += [v for held in operands if isinstance(held, list | tuple) for v in held]
        views = [view for operand in operands if (view := self._view(operand)) is not None]
        if not views or _is_fact(result):
            return result
        if first is not None and self._remember_parts(func, args, kwargs, result, first):
            return result
        product = self._product(func, args, kwargs)
        if product is None or not isinstance(result, Tensor):
            parameter = views[0].parameter
            raise CalibrationError(
                f"{type(parameter.module).__name__} passes {parameter.label} to "
                f"{resolve_name(func) or func}, which the calibration cannot follow; it knows matrix "
                "products with experts that are indexed, gathered or grouped. Call "
                "model.set_experts_implementation('eager') before, or leave the parameter out."
            )
        return self.see(product, result)

    def _remember_parts(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, view: View
    ) -> bool:
        """Remember the result if it is a part of a part, and say whether it is."""
        if func in _UNBINDS and view.experts is None and len(args) == 1 and not kwargs:
            for index, part in enumerate(result):
                self.views[part] = dataclasses.replace(view, experts=index)
            return True
        part = _part_of(func, args, kwargs, view)
        if part is not None:
            self.views[result] = part
        return part is not None

    def _view(self, operand: Any) -> View | None:
        if not isinstance(operand, Tensor):
            return None
        for parameter in self.parameters:
            if operand is parameter.tensor():
                whole = None if operand.dim() == 3 else 0
                return View(parameter, whole)
        return self.views.get(operand)

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
        """The product that a function computes; `None` if it computes something else."""
        name = getattr(func, "__name__", "").partition(".")[0]
        if func is F.linear:
            x, weight = _arguments(("input", "weight"), args, kwargs)
            return _product(x, self._view(weight), by_last=True)
        if name in _GROUPED:
            x, weight, ends = _arguments(("input", "weight", "offs"), args, kwargs)
            view = self._view(weight)
            if view is None or view.experts is not None or not isinstance(ends, Tensor):
                return None
            return _product(x, view, by_last=False, ends=ends)
        if func not in _PRODUCTS or kwargs or len(args) != 2:
            return None
        left, right = reversed(args) if func is Tensor.__rmatmul__ else args
        if (view := self._view(right)) is not None:
            return _product(left, view, by_last=False)
        return _product(right, self._view(left), by_last=True, columns=True)


def _product(
    x: Any, view: View | None, *, by_last: bool, columns: bool = False, ends: Tensor | None = None
) -> Product | None:
    """Describe a product; `None` if it is not one of token rows with known experts.

    Args:
        x: the other factor.
        view: the part of the parameter that is multiplied.
        by_last: whether the sum runs over the last dimension of the matrix.
        columns: whether tokens are columns.
        ends: where the rows of each expert end.
    """
    if view is None or not isinstance(x, Tensor):
        return None
    if not isinstance(view.experts, int) and ends is None and x.dim() not in (2, 3):
        return None
    sums_inputs = (by_last != view.turned) != view.parameter.transposed
    return Product(view.parameter, x, view.experts, ends, columns, swapped=not sums_inputs)


def _part_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], view: View) -> View | None:
    """The part of the parameter that a function of a part returns; `None` if it is no part."""
    if func in _COPIES:
        return view
    turns = func in _TURNS or (func in _EXCHANGES and _exchanges_last_two(args, kwargs))
    if turns:
        return dataclasses.replace(view, turned=not view.turned)
    if view.experts is not None:
        return None
    index = None
    if func is Tensor.__getitem__:
        index = args[1]
    elif func in _SELECTS:
        _, dim, index = _arguments(("input", "dim", "index"), args, kwargs)
        index = index if dim == 0 else None
    experts = _experts_at(index, len(view.parameter.names))
    return None if experts is None else dataclasses.replace(view, experts=experts)


def _experts_at(index: Any, n_experts: int) -> int | Tensor | None:
    """The experts that an index of the first dimension selects; `None` if it is another index."""
    if isinstance(index, Tensor):
        if index.dtype in (torch.bool, torch.uint8) or index.dim() > 1:
            return None
        return index if index.dim() else int(index) % n_experts
    is_integer = hasattr(index, "__index__") and not isinstance(index, bool)
    return int(index) % n_experts if is_integer else None


def _exchanges_last_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dims = [*args[1:], *kwargs.values()]
    return {dim % args[0].dim() for dim in dims} == {args[0].dim() - 2, args[0].dim() - 1}


def _arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments by name, wherever they were passed; `None` for those that were not."""
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in names]


def _is_fact(result: Any) -> bool:
    """Whether a result holds no tensor of floating numbers: a shape, a dtype, a comparison."""
    values = result if isinstance(result, list | tuple) else [result]
    return not any(isinstance(v, Tensor) and v.is_floating_point() for v in values)
