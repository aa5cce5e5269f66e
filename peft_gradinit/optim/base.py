"""What the optimisers of pairs share: groups, state, float32 masters, and the order of a step.

An optimiser says which state it keeps (`layouts`) and how a stack of pairs moves (`update`). Here is
everything else: pairs of one shape are stacked, the state is kept by parameter as plain tensors of
at least float32, and what is in no pair is AdamW's. A factor without a gradient stands still with its
state, and the other one of its pair takes its own part of the step. So does an expert that no token of a
batch has reached. Each factor, and each expert, counts its own steps.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..linalg import exact_products
from ..numbers import as_python
from .adamw import adamw_step, master_of
from .groups import (
    OF_MODEL,
    check_layout,
    group_of_pairs,
    groups_of_rest,
    slots_of,
    trainable_pairs,
)
from .options import Common, check_options, check_positive, defaults, options_of
from .stacks import (
    MASTER,
    Count,
    Layout,
    Slot,
    Stack,
    as_parameters,
    by_expert,
    stacks,
    whole_rows,
    working_dtype,
    write_rows,
)
from .states import check_shapes, device_of, zeros


class PairOptimizer(torch.optim.Optimizer):
    """Steps the pairs of LoRA adapters as pairs, and everything else with AdamW.

    The first group holds the pairs; a schedule that multiplies rates keeps their ratios.

    Args:
        model: the model with the adapter, inside DDP or not, sharded by FSDP2 or not.
        options: the method's own, kept in the group of the pairs.
        **common: see `Common`.

    Raises:
        ConfigError: if a number has no meaning, the layout is not served, or the model has no pairs.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    def __init__(self, model: nn.Module, options: Mapping[str, Any], **common: Any) -> None:
        check_layout(model, self.title)
        check_options(self.title, common, options_of(type(self)))
        values: dict[str, Any] = {name: as_python(v) for name, v in (defaults() | common).items()}
        options = {name: as_python(value) for name, value in options.items()}
        self.check(options)
        numbers = {k: v for k, v in values.items() if k != "adapter_name"}
        if values["head_lr"] is None:
            del numbers["head_lr"]
        check_positive(self.title, **numbers)
        found = trainable_pairs(model, values["adapter_name"], self.title)
        lr, decay = values["lr"], values["weight_decay"]
        of_pairs = group_of_pairs(model, found, self.title, lr=lr, weight_decay=decay, **options)
        of_rest = values["head_lr"], values["head_weight_decay"], self.title
        rest = groups_of_rest(model, found, *of_rest)
        super().__init__([of_pairs, *rest], {"lr": lr, "weight_decay": 0.0})

    @abstractmethod
    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options of the method's own that have no meaning; NumPy's numbers are Python's here.

        Raises:
            ConfigError: if one has none.
        """

    @abstractmethod
    def layouts(self, options: Mapping[str, Any]) -> dict[str, Layout]:
        """The state by name, all of it zero at first; `_A` and `_B` say with which factor it is kept."""

    @abstractmethod
    def update(
        self, stack: Stack, state: dict[str, Tensor], options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """New `A` and `B` of a stack; the state is changed in place, or replaced in its dict.

        Args:
            stack: pairs of one shape.
            state: by the names of `layouts`, stacked likewise.
            options: the group of the pairs.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that AdamW steps.

        Args:
            param_group: with `params` and their `lr`.

        Raises:
            ConfigError: if there is no `lr`: the default is the rate of the pairs, in other units.
        """
        if "lr" not in param_group:
            raise ConfigError(
                f"{self.title} gives parameters that are added to AdamW, and the group names no rate; "
                'pass {"params": ..., "lr": ...}. Pairs of another adapter cannot be added: make a new '
                "optimiser with adapter_name=[...]."
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients.

        Returns:
            What the closure gives.

        Raises:
            ConfigError: if no parameter has a gradient, or pairs are none any more: the optimiser
                holds other parameters than the model.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slots = [slots_of(g, self.title) if "scalings" in g else None for g in self.param_groups]
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            raise ConfigError(
                f"{self.title}: none of its parameters has a gradient, so nothing would train. If another "
                "adapter is active (set_adapter), name both: adapter_name=[…]. If the model was sharded "
                "after the optimiser was made, make it afterwards, or let Accelerate prepare both "
                "together; else call backward before step."
            )
        for group, of_pairs in zip(self.param_groups, slots, strict=True):
            if of_pairs is None:
                adamw_step(group, self.state)
            else:
                self._step_pairs(group, of_pairs)
        return loss

    @torch.no_grad()
    def _step_pairs(self, group: dict[str, Any], pairs: list[Slot]) -> None:
        layouts = self.layouts(group)
        whole = "weight" in layouts.values()

        def size(slot: Slot) -> int:
            out, columns = slot.B.shape[0], slot.A.shape[1]
            return slot.n_experts * out * columns if whole else slot.A.numel() + slot.B.numel()

        for slots in stacks(pairs, self.state, size):
            with exact_products(slots[0].A.device):
                self._step_stack(slots, layouts, group)

    def _step_stack(
        self, slots: list[Slot], layouts: dict[str, Layout], group: dict[str, Any]
    ) -> None:
        for slot in slots:
            self._prepare(slot, layouts)
        stack, state = self._read(slots, layouts)
        reached = None
        if slots[0].n_experts > 1:
            factors, state, reached = self._update_experts(stack, state, group)
        else:
            factors = self.update(stack, state, group)
        self._write(slots, layouts, factors, state)
        self._count(slots, layouts, reached)

    def _update_experts(
        self, stack: Stack, state: dict[str, Tensor], group: dict[str, Any]
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor], Tensor]:
        before = {name: entry.clone() for name, entry in state.items()}
        new_A, new_B = self.update(stack, state, group)
        reached = (stack.gA.flatten(1).any(1) | stack.gB.flatten(1).any(1))[:, None, None]
        state = {name: torch.where(reached, state[name], before[name]) for name in state}
        factors = torch.where(reached, new_A, stack.A), torch.where(reached, new_B, stack.B)
        return factors, state, reached

    def _prepare(self, slot: Slot, layouts: Mapping[str, Layout]) -> None:
        """Zeros for the state of a pair that has none."""
        for factor in (slot.A, slot.B):
            entries = self.state[factor]
            step = entries.get("step", 0)
            if slot.n_experts == 1:
                entries["step"] = int(step)  # a checkpoint may hold a tensor
            else:  # older checkpoints have one number
                counts = torch.as_tensor(step, dtype=torch.float32)
                entries["step"] = counts.to(device_of(factor)).expand(slot.n_experts)
        for name, layout in layouts.items():
            owner, entry = self._place(slot, name)
            if entry not in owner:
                owner[entry] = zeros(slot, layout)

    def _place(self, slot: Slot, name: str) -> tuple[dict[str, Any], str]:
        entry, _, side = name.rpartition("_")
        return self.state[slot.A if side == "A" else slot.B], entry

    def _read(
        self, slots: list[Slot], layouts: Mapping[str, Layout]
    ) -> tuple[Stack, dict[str, Tensor]]:
        columns: dict[str, list[Any]] = {}
        moves = slots[0].moves
        for side, moving in zip(("A", "B"), moves, strict=True):
            factors = [getattr(slot, side) for slot in slots]
            if moving:
                columns[side] = [master_of(f, self.state[f]) for f in factors]
                columns[f"g{side}"] = [f.grad.to(working_dtype(f)) for f in factors]
            else:
                columns[side] = [f.to(working_dtype(f)) for f in factors]
        of_state = {n: [self._entry(s, n) for s in slots] for n in layouts}
        spread = {n: of_state[n] for n, layout in layouts.items() if layout in ("A", "B")}
        rows = whole_rows(columns | spread)
        device = rows["A"].device
        kept = {n: torch.stack(of_state[n]).to(device) for n in layouts if n not in spread}
        kinds: dict[str, Layout] = {"A": "A", "B": "B", "gA": "A", "gB": "B", **layouts}
        n = slots[0].n_experts
        found = {k: by_expert(v, kinds[k], n) for k, v in (rows | kept).items()}
        A, B = found["A"], found["B"]
        gA, gB = (found.get(f"g{s}", torch.zeros_like(found[s])) for s in ("A", "B"))
        steps = self._next(slots, "A", A.dtype), self._next(slots, "B", A.dtype)
        stack = Stack(A, B, gA, gB, slots[0].scaling, steps, moves, slots[0].is_output)
        return stack, {name: found[name] for name in layouts}

    def _next(self, slots: list[Slot], side: str, dtype: torch.dtype) -> Count:
        counts = [self.state[getattr(slot, side)]["step"] for slot in slots]
        if slots[0].n_experts == 1:
            return counts[0] + 1
        return torch.cat(counts)[:, None, None].to(dtype) + 1

    def _count(
        self, slots: list[Slot], layouts: Mapping[str, Layout], reached: Tensor | None
    ) -> None:
        """One step more for the state that is kept with a factor, if it has changed."""
        for side, moving in zip(("A", "B"), slots[0].moves, strict=True):
            kept = [layout for name, layout in layouts.items() if name.endswith(f"_{side}")]
            if not moving and "weight" not in kept:
                continue
            for i, slot in enumerate(slots):
                entries = self.state[getattr(slot, side)]
                of_slot = 1 if reached is None else reached.view(len(slots), -1)[i]
                entries["step"] = entries["step"] + of_slot

    def _entry(self, slot: Slot, name: str) -> Tensor:
        owner, entry = self._place(slot, name)
        return owner[entry]

    def _write(
        self,
        slots: list[Slot],
        layouts: Mapping[str, Layout],
        factors: tuple[Tensor, Tensor],
        state: Mapping[str, Tensor],
    ) -> None:
        n = slots[0].n_experts
        for name, layout in layouts.items():
            values = as_parameters(state[name], layout, n)
            write_rows([self._entry(slot, name) for slot in slots], values)
        sides: tuple[Layout, Layout] = ("A", "B")
        for side, values, moving in zip(sides, factors, slots[0].moves, strict=True):
            parameters = [getattr(slot, side) for slot in slots]
            if moving:
                masters = [self.state[p].get(MASTER, p) for p in parameters]
                write_rows(masters, as_parameters(values, side, n))
                for parameter, master in zip(parameters, masters, strict=True):
                    if master is not parameter:
                        parameter.copy_(master)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of at least float32.

        `torch.optim.Optimizer` rounds the state of a half-precision parameter to that precision, and
        takes all of a group from the state. What a group says of the model stays here.

        Raises:
            ConfigError: if the state is of another optimiser, of another mode, or of other ranks.
        """
        if state_dict["param_groups"]:  # torch says what is wrong with none
            self._check_same(state_dict["param_groups"][0])
        for group in (g for g in self.param_groups if "scalings" in g):
            slots = slots_of(group, self.title)
            check_shapes(slots, self.layouts(group), self.param_groups, state_dict)
        facts = [{k: g[k] for k in OF_MODEL if k in g} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, of_model in zip(self.param_groups, facts, strict=True):
            group.update(of_model)
        ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        parameters = chain.from_iterable(g["params"] for g in self.param_groups)
        for i, parameter in zip(ids, parameters, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                loaded = self.state[parameter][key]
                dtype = working_dtype(parameter)
                if isinstance(value, Tensor) and key != "step" and loaded.dtype != dtype:
                    self.state[parameter][key] = value.to(loaded.device, dtype, copy=True)

    def _check_same(self, loaded: Mapping[str, Any]) -> None:
        own = options_of(type(self)) - set(Common.__annotations__)
        if missing := sorted(own - loaded.keys()):
            got, want = f"no {', '.join(missing)}", f"{sorted(own)}"
        else:
            got, want = (f"mode={g.get('mode')!r}" for g in (loaded, self.param_groups[0]))
        if got != want:
            raise ConfigError(
                f"{self.title} was given the state of another optimiser: its group has {got}, where "
                f"{self.title} has {want}. Load it into an optimiser of the kind that saved it."
            )


def decayed(factor: Tensor, decay: float) -> Tensor:
    """A copy that has shrunk by `1 - decay`."""
    return factor * (1 - decay)
