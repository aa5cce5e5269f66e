"""Cost of a LoRA-GA calibration and of a training step, next to what they are compared with.

    python scripts/bench_calibration.py [--hidden 1536 --layers 3 --repetitions 5]
    python scripts/bench_calibration.py --model smollm2

One Llama-shaped model with random weights and tokens, or SmolLM2 with functions as chats; the same
batches for all:

(a) floor: forward and input-gradient backward alone, the least that any gradient method can do;
(b) ours: calibration pass, factorisation, injection (`get_peft_model`) of LoRA-GA;
(c) peft: PEFT's own LoRA-GA, `preprocess_loraga` and `get_peft_model`;

and with SmolLM2 also

(d) forward: forward passes alone, the least that EVA can do;
(e) our EVA;
(f) PEFT's EVA: `get_peft_model` and `initialize_lora_eva_weights`, until it has converged.

Every figure comes from a process of its own, so that peak memory is that of one candidate;
candidates take turns within a repetition. Prints medians with their range and the ratios pair by
pair; `--json FILE` keeps the figures.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import smollm2_chats
import torch
import transformers
from peft import (
    LoraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
)
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from peft_gradinit import Calibration, EvaConfig, LoraGAConfig
from peft_gradinit.recipes.embedded import smollm2_folder

ADAPTER = {"r": 8, "lora_alpha": 16, "use_rslora": True, "task_type": "CAUSAL_LM"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 4096  # small, so that the head does not hide the cost of the layers
N_TIMED_STEPS = 4
console = Console()


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """Llama-shaped, float32, frozen weights as `from_pretrained` leaves them."""
    if options.model == "smollm2":
        return LlamaForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    return random_llama(options)


def random_llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights, of `options.hidden` and `options.layers`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Random tokens, every one of which carries loss; for SmolLM2, functions as chats."""
    if options.model == "smollm2":
        n = options.batches * options.batch_size
        return list(smollm2_chats.batches(n, options.batch_size))
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch_size, options.length)
    rows = [
        torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(options.batches)
    ]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def floor(model: LlamaForCausalLM, batches: list) -> None:
    """(a): the gradient of every layer's input, and of no weight."""
    model.eval().requires_grad_(False)
    model.enable_input_require_grads()
    for batch in batches:
        model(**batch).loss.backward()


def ours(model: LlamaForCausalLM, batches: list) -> None:
    """(b)."""
    calibration = Calibration(batches, progress=False, max_batches=len(batches))
    config = LoraGAConfig(**ADAPTER, target_modules=PROJECTIONS, calibration=calibration)
    get_peft_model(model, config)


def pefts(model: LlamaForCausalLM, batches: list) -> None:
    """(c)."""
    config = LoraConfig(
        **ADAPTER,
        target_modules=PROJECTIONS,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )

    def train_step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    get_peft_model(model, config)


@torch.no_grad()
def forward(model: LlamaForCausalLM, batches: list) -> None:
    """(d)."""
    for batch in batches:
        model.eval()(**batch)


def our_eva(model: LlamaForCausalLM, batches: list) -> None:
    """(e), with the ranks of the layers as they are."""
    calibration = Calibration(batches, progress=False, max_batches=len(batches))
    adapter = {**ADAPTER, "target_modules": PROJECTIONS, "rho": 1}
    get_peft_model(model, EvaConfig(**adapter, calibration=calibration))


def pefts_eva(model: LlamaForCausalLM, batches: list) -> None:
    """(f), likewise; it goes round the batches until its components have converged."""
    config = LoraConfig(
        **ADAPTER,
        target_modules=PROJECTIONS,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
    )
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)


GRADIENTS: dict[str, Callable] = {"floor": floor, "ours": ours, "peft": pefts}
INPUTS: dict[str, Callable] = {"forward": forward, "our EVA": our_eva, "PEFT's EVA": pefts_eva}
CANDIDATES = {**GRADIENTS, **INPUTS}


def time_step(model: torch.nn.Module, batch: dict) -> float:
    """Seconds of one training step without the optimiser."""
    started = time.perf_counter()
    model(**batch).loss.backward()
    seconds = time.perf_counter() - started
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def measure_steps(options: argparse.Namespace) -> dict[str, list[float]]:
    """Training steps of plain LoRA and of the anchored adapter, in turns, in this process."""
    batches = make_batches(options)
    lora = get_peft_model(make_model(options), LoraConfig(**ADAPTER, target_modules=PROJECTIONS))
    calibration = Calibration(batches[:1], progress=False, max_batches=1)
    config = LoraGAConfig(**ADAPTER, target_modules=PROJECTIONS, calibration=calibration)
    models = {"lora": lora.train(), "anchored": get_peft_model(make_model(options), config).train()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(N_TIMED_STEPS + 1):
        for name, model in models.items():
            times[name].append(time_step(model, batches[0]))
    return {name: values[1:] for name, values in times.items()}


def measure_candidate(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and extra peak memory of one candidate, in this process."""
    model, batches = make_model(options), make_batches(options)
    model(**batches[0])  # warm-up: pages and kernels
    before = peak_bytes()
    started = time.perf_counter()
    CANDIDATES[name](model, batches)
    return {"seconds": time.perf_counter() - started, "bytes": peak_bytes() - before}


def peak_bytes() -> int:
    """Peak resident memory of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_new_process(arguments: list[str]) -> dict:
    """Run this script with other arguments and read its last line."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], unit: str = "", digits: int = 2) -> str:
    """Median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def compare(options: argparse.Namespace, passed_on: list[str]) -> dict:
    """All repetitions, printed as a table."""
    real = options.model == "smollm2"
    names = CANDIDATES if real else GRADIENTS
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    steps: list[float] = []
    for repetition in range(options.repetitions):
        for name in names:
            runs[name].append(in_new_process([*passed_on, "--candidate", name]))
        times = in_new_process([*passed_on, "--steps"])
        steps.append(statistics.median(times["anchored"]) / statistics.median(times["lora"]))
        console.print(f"repetition {repetition + 1} of {options.repetitions} done")
    sizes = f"hidden {options.hidden}, {options.layers} layers"
    tokens = f"{sum(b['input_ids'].numel() for b in make_batches(options)):,} tokens"
    table = Table(title=f"{'SmolLM2-135M' if real else sizes}, r 8, {tokens}")
    for column in ("", "seconds", "extra peak memory, MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in runs.items():
        seconds = spread([v["seconds"] for v in values])
        table.add_row(name, seconds, spread([v["bytes"] / 2**20 for v in values], digits=0))
    console.print(table)

    def ratio(over: str, under: str, key: str) -> list[float]:
        return [a[key] / max(1, b[key]) for a, b in zip(runs[over], runs[under], strict=True)]

    floor_bytes = [v["bytes"] for v in runs["floor"]]
    extra = [
        max(0, a["bytes"] - f) / max(1, b["bytes"] - f)
        for a, b, f in zip(runs["ours"], runs["peft"], floor_bytes, strict=True)
    ]
    ratios = {
        "ours / floor, time": ratio("ours", "floor", "seconds"),
        "PEFT / ours, time": ratio("peft", "ours", "seconds"),
        "ours / PEFT, memory above the floor's": extra,
        "training step, anchored / LoRA": steps,
    }
    if real:
        ratios["our EVA / forward, time"] = ratio("our EVA", "forward", "seconds")
        ratios["PEFT's EVA / ours, time"] = ratio("PEFT's EVA", "our EVA", "seconds")
    for name, values in ratios.items():
        console.print(f"{name}: {spread(values)}")
    kept = {k: v for k, v in vars(options).items() if type(v) is int}  # flags are bools
    return {"options": kept, "runs": runs, "ratios": ratios}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("hidden", 1536),
        ("layers", 3),
        ("repetitions", 5),
        ("batches", 8),
        ("batch-size", 2),
        ("length", 512),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", choices=("random", "smollm2"), default="random")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--candidate", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if options.candidate:
        print(json.dumps(measure_candidate(options.candidate, options)))
    elif options.steps:
        print(json.dumps(measure_steps(options)))
    else:
        figures = compare(options, sys.argv[1:])
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
