"""What a calibration holds and sends, against width, rank and layers: measured, and computed.

    python scripts/bench_scaling.py [--widths 512 768 1024 --ranks 4 8 16 --layers 1 2 4]
    python scripts/bench_scaling.py --computed-only

1. Measured: LoRA-GA calibrations of Llama-shaped models with random weights, each in a process of
   its own (and in two, over gloo, which count the bytes that they sum and broadcast), next to
   `estimator="dense"`, which keeps whole gradients. One of width, rank and layers varies at a time.
   The exponents of power laws through the points check the claim: `O(k (out + in))` a layer, where
   a whole gradient is `O(out in)`.
2. Computed by `peft-gradinit calibrate --dry-run`, from the configs in `configs/shapes/` alone.

`--json FILE` keeps the figures.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from peft_gradinit import Calibration, LoraGAConfig, calibrate
from peft_gradinit.statistics.gradient_sketch import default_width

SHAPES = Path(__file__).parents[1] / "configs" / "shapes"
VOCABULARY = 256  # small, so that the head does not hide the layers
AXES = ("width", "rank", "layers")
RUNS = {"one": ("sketch", 1), "two": ("sketch", 2), "dense": ("dense", 1)}
MIB = 2**20
console = Console(width=120)


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """Llama-shaped, float32; all dimensions of its layers grow with the width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 5 // 2,
        num_hidden_layers=options.n_layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def make_batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Random tokens in batches of one sequence; every token carries loss."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, options.length)
    rows = [torch.randint(VOCABULARY, shape, generator=generator) for _ in range(options.sequences)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def count_traffic() -> dict[str, int]:
    """Count the bytes of every tensor that is summed or broadcast from now on."""
    sent = {"all_reduce": 0, "broadcast": 0}

    def counted(name: str) -> Any:
        collective = getattr(dist, name)

        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sent[name] += tensor.numel() * tensor.element_size()
            return collective(tensor, *args, **kwargs)

        return call

    for name in sent:
        setattr(dist, name, counted(name))
    return sent


def measure(options: argparse.Namespace) -> dict[str, int]:
    """One calibration in this process, which may be one of several."""
    model, batches = make_model(options), make_batches(options)
    model(**batches[0])  # warm-up: pages and kernels
    sent, before = count_traffic(), peak_bytes()
    data = Calibration(batches, progress=False, estimator=options.estimator)
    config = LoraGAConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    facts = calibrate(model, config, data).facts
    return {
        "held": facts.state_bytes,
        "peak": peak_bytes() - before,
        "summed": sent["all_reduce"],
        "broadcast": sent["broadcast"],
    }


def peak_bytes() -> int:
    """Peak resident memory of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_new_processes(point: dict[str, int], run: str, options: argparse.Namespace) -> dict:
    """Run this script once for each process of a run; the figures of the first."""
    estimator, size = RUNS[run]
    numbers = {**point, "sequences": options.sequences, "length": options.length}
    command = [sys.executable, __file__, "--estimator", estimator]
    command += [a for name, n in numbers.items() for a in (f"--{name}", str(n))]
    with tempfile.TemporaryDirectory() as folder:
        running = [
            subprocess.Popen(
                [*command, "--rank-of", str(rank), str(size), folder],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(size)
        ]
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"the run {run} at {point} failed")
    return json.loads(outputs[0].splitlines()[-1])


def points_of(options: argparse.Namespace) -> list[dict[str, int]]:
    """The middle of all axes, and on each axis its other values."""
    values = {axis: getattr(options, f"{axis}_values") for axis in AXES}
    middle = {axis: sorted(of)[len(of) // 2] for axis, of in values.items()}
    points = [{**middle, axis: value} for axis in AXES for value in sorted(values[axis])]
    return list({tuple(point.values()): point for point in points}.values())


def exponents(rows: list[dict], key: str) -> dict[str, float]:
    """Of `bytes ~ x^p` through the points of each axis, by least squares of the logarithms."""
    found = {}
    middle = {axis: most_common([row[axis] for row in rows]) for axis in AXES}
    for axis in AXES:
        on = [r for r in rows if all(r[a] == middle[a] for a in AXES if a != axis)]
        # Of the rank, what counts is the number of columns, for two triplets of each.
        xs = [math.log(default_width(2 * r[axis]) if axis == "rank" else r[axis]) for r in on]
        ys = [math.log(r[key]) for r in on]
        if len(on) > 1:
            mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
            slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
            found[axis] = slope / sum((x - mx) ** 2 for x in xs)
    return found


def most_common(values: list[int]) -> int:
    """The value that an axis has while another one varies."""
    return max(values, key=values.count)


def measured(options: argparse.Namespace) -> dict:
    """All runs, as a table, and the exponents."""
    rows = []
    for point in points_of(options):
        runs = {run: in_new_processes(point, run, options) for run in RUNS}
        rows.append({
            **point,
            "held": runs["one"]["held"],
            "summed": runs["two"]["summed"],
            "broadcast": runs["two"]["broadcast"],
            "peak": runs["one"]["peak"],
            "peak of two": runs["two"]["peak"],
            "dense held": runs["dense"]["held"],
            "dense peak": runs["dense"]["peak"],
        })
        console.print(f"{point} done")
    sizes = [name for name in rows[0] if name not in AXES]
    table = Table(title=f"Measured, MiB; {options.sequences} sequences of {options.length} tokens")
    for column in (*AXES, *sizes):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [str(row[axis]) for axis in AXES] + [f"{row[s] / MIB:.1f}" for s in sizes]
        table.add_row(*cells)
    console.print(table)
    laws = {key: exponents(rows, key) for key in ("held", "summed", "broadcast", "dense held")}
    for key, of in laws.items():
        grows = ", ".join(f"{name_of(axis)}^{p:.2f}" for axis, p in of.items())
        console.print(f"{key} grows as {grows}", highlight=False)
    return {"rows": rows, "exponents": laws}


def name_of(axis: str) -> str:
    """What a power is of."""
    return "columns" if axis == "rank" else axis


def computed(options: argparse.Namespace) -> dict[str, dict]:
    """Dry runs on the configs, as a table in Markdown, which the benchmarks show."""
    found = {}
    for shape in sorted(SHAPES.iterdir()):
        command = [sys.executable, "-m", "peft_gradinit_cli", "calibrate", str(shape), "--dry-run"]
        command += ["--json", "--processes", str(options.processes), "--r", str(options.r)]
        # What is timed for an estimate in seconds is not of interest here.
        done = subprocess.run(
            [*command, "--dtype", "bfloat16"], check=True, capture_output=True, text=True
        )
        found[shape.name] = json.loads(done.stdout)
    first = next(iter(found.values()))
    print(
        f"LoRA-GA, r {options.r}, all linear layers, {first['n_tokens']:,} tokens in "
        f"{first['n_sequences']} sequences, {options.processes} processes:\n\n"
        "| | matrices | weights, bf16 | statistics | whole gradients | summed | "
        "broadcast | summed once, whole | FLOP | of them statistics |\n" + "|---" * 10 + "|"
    )
    for name, c in found.items():
        sizes = ("weight_bytes", "statistic_bytes", "dense_bytes", "summed_bytes")
        sent = c["agreed_bytes"] + c["broadcast_bytes"]
        cells = [f"{c['n_targets']:,}", *(gib(c[s]) for s in sizes)]
        cells += [gib(sent), gib(c["dense_summed_bytes"]), f"{c['flops']:.1e}"]
        cells.append(f"{c['statistic_flops'] / c['flops']:.1%}")
        print(f"| {' | '.join([name, *cells])} |")
    return found


def gib(n: float) -> str:
    """A number of bytes."""
    return f"{n / 2**30:,.1f} GiB"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for axis, values in (("width", [512, 768, 1024]), ("rank", [4, 8, 16]), ("layers", [1, 2, 4])):
        flag = "--layers" if axis == "layers" else f"--{axis}s"
        parser.add_argument(flag, dest=f"{axis}_values", nargs="+", type=int, default=values)
    for name, default in (("sequences", 16), ("length", 32), ("processes", 8), ("r", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--computed-only", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def parse_one() -> argparse.Namespace:
    """The command line of one measuring process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--estimator")
    for name in ("width", "rank", "sequences", "length"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--layers", dest="n_layers", type=int)
    parser.add_argument("--rank-of", nargs=3)
    return parser.parse_args()


def main() -> None:
    """Measure one point, or all of them."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if "--rank-of" in sys.argv:
        options = parse_one()
        rank, size, folder = options.rank_of
        if size != "1":
            dist.init_process_group(
                "gloo", f"file://{folder}/init", rank=int(rank), world_size=int(size)
            )
        print(json.dumps(measure(options)))
        return
    options = parse()
    figures = {} if options.computed_only else {"measured": measured(options)}
    figures["computed"] = computed(options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
