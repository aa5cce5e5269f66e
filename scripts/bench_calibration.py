"""Cost of a LoRA-GA calibration and of a training step, next to what they are compared with.

    python scripts/bench_calibration.py [--hidden 1536 --layers 3 --repetitions 5]
    python scripts/bench_calibration.py --model smollm2
    python scripts/bench_calibration.py --device cuda --json figures.json

One Llama-shaped model with random weights and tokens, or SmolLM2 with functions as chats; the same
batches for all:

(a) floor: forward and input-gradient backward alone, the least that any gradient method can do;
(b) ours: calibration pass, factorisation, injection (`get_peft_model`) of LoRA-GA;
(c) peft: PEFT's own LoRA-GA, `preprocess_loraga` and `get_peft_model`; not on 4-bit weights, which
    it cannot rewrite;

and with SmolLM2 also

(d) forward: forward passes alone, the least that EVA can do;
(e) our EVA;
(f) PEFT's EVA: `get_peft_model` and `initialize_lora_eva_weights`, until it has converged.

On an accelerator the shapes of a model of one billion and of one of seven billion parameters run in
bfloat16 and in 4 bits, unless `--model` says otherwise. Times there wait for the device, and the
kernels of a linear layer in a batch are counted, next to the floor's.

Every figure comes from a process of its own; candidates take turns within a repetition. Memory is
the most that torch holds in tensors at once, besides model and data. Prints medians with their range
and the ratios pair by pair; `--json FILE` keeps the figures.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import bench_models
import peft
import torch
import transformers
from bench_gauges import finished, kernels_counted, memory_held
from peft import (
    LoraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
)
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from peft_gradinit import Calibration, EvaConfig, LoraGAConfig

ADAPTER = {"r": 8, "lora_alpha": 16, "use_rslora": True, "task_type": "CAUSAL_LM"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_TIMED_STEPS = 4
console = Console()


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """The model of these options, frozen."""
    size = {"hidden": options.hidden, "layers": options.layers}
    of = {"device": options.device, "dtype": options.dtype, "bits": options.bits}
    return bench_models.make_model(options.model, **of, **size)


def make_batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Its data."""
    shape = bench_models.SHAPES.get(options.model, {"vocab_size": bench_models.VOCABULARY})
    size = (options.batches, options.batch_size, options.length)
    return bench_models.batches(options.model, *size, options.device, shape["vocab_size"])


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
    device = batch["input_ids"].device
    started = finished(device)
    model(**batch).loss.backward()
    seconds = finished(device) - started
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def measure_steps(options: argparse.Namespace) -> dict[str, list[float]]:
    """Training steps of plain LoRA and of the anchored adapter, in turns, in this process."""
    batches = make_batches(options)
    base = make_model(options)
    calibration = Calibration(batches[:1], progress=False, max_batches=1)
    config = LoraGAConfig(**ADAPTER, target_modules=PROJECTIONS, calibration=calibration)
    plain = LoraConfig(**ADAPTER, target_modules=PROJECTIONS)
    # The same weights for both: two models of seven billion parameters may not fit.
    models = {"lora": get_peft_model(sharing_weights(base), plain).train()}
    models["anchored"] = get_peft_model(base, config).train()
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(N_TIMED_STEPS + 1):
        for name, model in models.items():
            times[name].append(time_step(model, batches[0]))
    return {name: values[1:] for name, values in times.items()}


def sharing_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def measure_candidate(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one candidate, in this process; on a device also its memory and kernels."""
    model, batches = make_model(options), make_batches(options)
    device = torch.device(options.device)
    model(**batches[0])  # warm-up: pages and kernels
    on_device = device.type != "cpu"
    before = torch.accelerator.max_memory_allocated() if on_device else 0
    started = finished(device)
    with kernels_counted(device) as kernels:
        CANDIDATES[name](model, batches)
    found = {"seconds": finished(device) - started}
    n_calls = len(batches) * model.config.num_hidden_layers * len(PROJECTIONS)
    if on_device:
        found["bytes"] = torch.accelerator.max_memory_allocated() - before
    return found | ({"kernels": kernels[0] / n_calls} if kernels else {})


def measure_memory(name: str, options: argparse.Namespace) -> dict[str, float]:
    """The most that one candidate holds in tensors at once on the CPU, besides model and data."""
    model, batches = make_model(options), make_batches(options)
    with memory_held(torch.device("cpu")) as peak:
        CANDIDATES[name](model, batches)
    return {"bytes": peak[0]}


def in_new_process(arguments: list[str]) -> dict:
    """Run this script with other arguments and read its last line."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], unit: str = "", digits: int = 2) -> str:
    """Median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def compare(options: argparse.Namespace) -> dict:
    """All repetitions of one model, printed as a table."""
    real = options.model == "smollm2"
    names = [n for n in (CANDIDATES if real else GRADIENTS) if n != "peft" or options.bits is None]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    steps: list[float] = []
    memory: dict[str, dict[str, float]] = {name: {} for name in names}
    if options.device == "cpu":  # always the same, so once
        of = ["--memory", *as_arguments(options), "--candidate"]
        memory = {name: in_new_process([*of, name]) for name in names}
    for repetition in range(options.repetitions):
        for name in names:
            found = in_new_process([*as_arguments(options), "--candidate", name])
            runs[name].append(memory[name] | found)
        times = in_new_process([*as_arguments(options), "--steps"])
        steps.append(statistics.median(times["anchored"]) / statistics.median(times["lora"]))
        console.print(f"repetition {repetition + 1} of {options.repetitions} done")
    print_table(options, runs)
    figures = ratios(runs) | {"training step, anchored / LoRA": steps}
    for name, values in figures.items():
        console.print(f"{name}: {spread(values)}")
    kept = {k: v for k, v in vars(options).items() if k in MODEL_OPTIONS or type(v) is int}
    return {"options": kept, "runs": runs, "ratios": figures}


def print_table(options: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    """Times, memory and kernels of all candidates."""
    sizes = f"hidden {options.hidden}, {options.layers} layers"
    title = sizes if options.model == "random" else options.model
    weights = options.dtype if options.bits is None else f"{options.bits} bits"
    n_tokens = sum(b["input_ids"].numel() for b in make_batches(options))
    table = Table(title=f"{title}, {weights}, r 8, {n_tokens:,} tokens, {options.device}")
    kernels = ["kernels of a layer and batch"] if "kernels" in runs["floor"][0] else []
    for column in ("", "seconds", "peak memory, MiB", *kernels):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in runs.items():
        seconds = spread([v["seconds"] for v in values])
        memory = spread([v["bytes"] / 2**20 for v in values], digits=0)
        table.add_row(name, seconds, memory, *[f"{values[0]['kernels']:.2f}" for _ in kernels])
    console.print(table)


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, list[float]]:
    """What is compared, pair by pair."""

    def ratio(over: str, under: str) -> list[float]:
        pairs = zip(runs[over], runs[under], strict=True)
        return [a["seconds"] / b["seconds"] for a, b in pairs]

    figures = {"ours / floor, time": ratio("ours", "floor")}
    if "peft" in runs:
        figures["PEFT / ours, time"] = ratio("peft", "ours")
        figures["ours / PEFT, memory above the floor's"] = [
            max(0, a["bytes"] - f["bytes"]) / max(1, b["bytes"] - f["bytes"])
            for a, b, f in zip(runs["ours"], runs["peft"], runs["floor"], strict=True)
        ]
    if "our EVA" in runs:
        figures["our EVA / forward, time"] = ratio("our EVA", "forward")
        figures["PEFT's EVA / ours, time"] = ratio("PEFT's EVA", "our EVA")
    return figures


MODEL_OPTIONS = ("model", "device", "dtype", "bits")
SIZES = {
    "hidden": 1536,
    "layers": 3,
    "repetitions": 5,
    "batches": 8,
    "batch-size": 2,
    "length": 512,
}


def as_arguments(options: argparse.Namespace) -> list[str]:
    """The command line of these options."""
    names = [*MODEL_OPTIONS, *(name.replace("-", "_") for name in SIZES)]
    values = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    return [part for name, v in given.items() for part in (f"--{name.replace('_', '-')}", str(v))]


def models(options: argparse.Namespace) -> list[argparse.Namespace]:
    """What one command runs: one model, or on an accelerator the published shapes."""
    if options.device == "cpu" or options.model is not None:
        own = {"model": options.model or "random", "dtype": options.dtype or "float32"}
        return [argparse.Namespace(**vars(options) | own)]
    every = (None, 4) if options.bits is None else (options.bits,)
    found = [{"model": name, "bits": bits} for name in bench_models.SHAPES for bits in every]
    dtype = {"dtype": options.dtype or "bfloat16"}
    return [argparse.Namespace(**vars(options) | of | dtype) for of in found]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", choices=("random", "smollm2", *bench_models.SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--bits", type=int, choices=(4,), help="quantise the layers")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--candidate", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if options.candidate:
        measure = measure_memory if options.memory else measure_candidate
        print(json.dumps(measure(options.candidate, options)))
    elif options.steps:
        print(json.dumps(measure_steps(options)))
    else:
        figures = [compare(of) for of in models(options)]
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
