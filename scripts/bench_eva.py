"""Our EVA against PEFT's on MiniLM: forwards, time, and explained variance against exact PCA.

Both are given the same batches of docstrings, rank 8, rho 2, all 36 linear layers of the encoder.
PEFT's cycles through the batches until all its components have converged (`tau` 0.99) and then
shares the ranks out; ours reads the batches once. Compared are the components of every layer, as
many as PEFT gave to the layer: the variance that they explain over what the best projection of that
rank explains, on all batches. Over a part of the data PEFT's converges as well, and on a data set
that is large next to what it reads it needs no more forwards than one pass does. Both adapters are then
trained alike, and their loss over the last 25 steps and accuracy on held-out docstrings compared.

    python scripts/bench_eva.py --texts 64 --batch-size 16
"""

import argparse
import json
import re
import time
import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from minilm_task import load_model, load_task, load_tokenizer
from peft import EvaConfig as PeftEvaConfig
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from peft_gradinit import Calibration, EvaConfig, calibrate

TARGETS = r"bert\.encoder\..*\.(query|key|value|dense)"


def main() -> None:
    """Run all and print one line for each."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    model = load_model().eval()
    batches = load_batches(options)
    moments = exact_moments(model, batches)

    theirs, count = run_peft(model, batches, options)
    ranks = {name: len(A) for name, A in theirs.items()}
    runs = {"PEFT, tau 0.99": (theirs, count, "converged")}
    runs["ours"] = run_ours(model, batches, options)
    for name, (components, count, ended_by) in runs.items():
        ratios = explained(components, ranks, moments)
        figures = {
            "run": name,
            "forwards": count.n,
            "seconds": round(count.seconds, 2),
            "explained_over_pca_median": round(ratios.median().item(), 5),
            "explained_over_pca_worst": round(ratios.min().item(), 5),
            "ended_by": ended_by,
        }
        if options.train_steps:
            state = theirs if components is theirs else None
            figures |= tuned(adapted(batches, options, state), options)
        print(json.dumps(figures))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rho", type=float, default=2.0)
    parser.add_argument("--train-steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tau", type=float, default=None, help="of ours; PEFT's is 0.99")
    parser.add_argument("--max-forwards", type=int, default=2000, help="cap on PEFT's loop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test-size", type=int, default=400, help="docstrings to test on")
    return parser.parse_args()


def load_batches(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Batches without labels, in a fixed order."""
    data = (
        load_task(options.test_size)["train"].remove_columns("labels").select(range(options.texts))
    )
    tokenizer = load_tokenizer()

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return dict(tokenizer.pad(rows, return_tensors="pt"))

    return list(DataLoader(data, options.batch_size, collate_fn=collate))


def exact_moments(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Centred second moment of every layer's inputs over all batches, float64: the reference."""
    sums: dict[str, list[Any]] = {name: [0.0, 0.0, 0] for name in target_layers(model)}
    mask = torch.empty(0)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0][mask].double()
            total = sums[name]
            total[0], total[1], total[2] = (
                total[0] + x.T @ x,
                total[1] + x.sum(0),
                total[2] + len(x),
            )

        return hook

    handles = [
        m.register_forward_pre_hook(hook_of(name)) for name, m in target_layers(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"].bool()
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: C / n - torch.outer(m / n, m / n) for name, (C, m, n) in sums.items()}


def target_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that get adapters."""
    return {name: m for name, m in model.named_modules() if re.fullmatch(TARGETS, name)}


class ForwardCount:
    """Counts the calls of a model while the block runs."""

    def __init__(self, model: nn.Module) -> None:
        self.n = 0
        self._model = model

    def __enter__(self) -> "ForwardCount":
        self._handle = self._model.register_forward_pre_hook(self._count)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._handle.remove()

    def _count(self, *_: object) -> None:
        self.n += 1


def run_peft(
    model: nn.Module, batches: list[dict[str, Tensor]], options: argparse.Namespace
) -> tuple[dict[str, Tensor], ForwardCount]:
    """PEFT's loop, which has no budget: end it with an error after `max_forwards`."""
    config = LoraConfig(
        r=options.rank,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=PeftEvaConfig(rho=options.rho, tau=0.99),
    )

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> object:
        if count.n >= options.max_forwards:
            raise SystemExit(f"PEFT's EVA has not converged after {count.n} forwards")
        return model(**batch)

    with ForwardCount(model) as count:
        found = get_eva_state_dict(
            model, batches, config, forward_fn=forward, show_progress_bar=False
        )
    return found, count


def run_ours(
    model: nn.Module, batches: list[dict[str, Tensor]], options: argparse.Namespace
) -> tuple[dict[str, Tensor], ForwardCount, str]:
    """One pass at most; returns all `r * rho` components of every layer, and why it ended."""
    config = EvaConfig(r=options.rank, rho=options.rho, tau=options.tau, target_modules=TARGETS)
    with ForwardCount(model) as count:
        result = calibrate(model, config, Calibration(batches, progress=False))
    components = {name: svd.Vh for name, svd in result.triplets.items()}
    return components, count, result.facts.stopped_by


def adapted(
    batches: list[dict[str, Tensor]], options: argparse.Namespace, theirs: dict[str, Tensor] | None
) -> PeftModel:
    """A fresh classifier with our start, or with PEFT's."""
    shape = {"r": options.rank, "lora_alpha": options.rank, "target_modules": TARGETS}
    shape |= {"use_rslora": True, "task_type": "SEQ_CLS"}
    if theirs is None:
        calibration = Calibration(batches, progress=False)
        return get_peft_model(
            load_model(), EvaConfig(**shape, rho=options.rho, calibration=calibration)
        )
    eva_config = PeftEvaConfig(rho=options.rho, adjust_scaling_factors=True)
    config = LoraConfig(**shape, init_lora_weights="eva", eva_config=eva_config)
    peft_model = get_peft_model(load_model(), config)
    # Under the names that the layers have now: PEFT starts layers that it misses as plain LoRA.
    found = {f"base_model.model.{name}": A for name, A in theirs.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the following layers were initialized")
        initialize_lora_eva_weights(peft_model, eva_state_dict=found, show_progress_bar=False)
    return peft_model


def tuned(model: PeftModel, options: argparse.Namespace) -> dict[str, float]:
    """Train for a fixed number of steps and evaluate."""
    task, collate = load_task(options.test_size), DataCollatorWithPadding(load_tokenizer())
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(task["train"], 16, shuffle=True, generator=order, collate_fn=collate)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.train_steps)
    losses: list[float] = []
    model.train()
    torch.manual_seed(0)
    while len(losses) < options.train_steps:
        for batch in islice(loader, options.train_steps - len(losses)):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # as Trainer does
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in DataLoader(task["test"], 64, collate_fn=collate):
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    last = losses[-25:]
    return {"loss": round(sum(last) / len(last), 3), "accuracy": right / len(task["test"])}


def explained(
    components: dict[str, Tensor], ranks: dict[str, int], moments: dict[str, Tensor]
) -> Tensor:
    """Variance explained by the leading components of every layer, over the best of that rank."""
    ratios = []
    for name, rank in ranks.items():
        A = torch.linalg.qr(components[name][:rank].double().T).Q
        best = torch.linalg.eigvalsh(moments[name])[-rank:].sum()
        ratios.append((A.T @ moments[name] @ A).trace() / best)
    return torch.stack(ratios)


if __name__ == "__main__":
    main()
