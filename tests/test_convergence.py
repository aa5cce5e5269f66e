"""The plan and the figures of the convergence benchmark, on curves that are known; and a tiny study."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_gradinit import pairs
from peft_gradinit.linalg import truncated_svd

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_convergence  # noqa: E402
import rate_rule  # noqa: E402
from bench_convergence import MEASURED, marks, page_of  # noqa: E402
from bench_convergence import shown as tables_of  # noqa: E402
from convergence import further  # noqa: E402
from convergence.changes import n_intruders  # noqa: E402
from convergence.half import RoundedProducts, half_products  # noqa: E402
from convergence.methods import METHODS  # noqa: E402
from convergence.neighbours import muon  # noqa: E402
from convergence.plan import (  # noqa: E402
    MAX_STEPS_FROM_FIRST,
    best_rate,
    neighbouring_rates,
    next_rates,
    rate,
    steps_to,
    usable_range,
)
from convergence.report import COLUMNS, at_a_glance, beside, interval, longer, markdown  # noqa: E402
from convergence.settings import load_settings  # noqa: E402
from convergence.study import Study, carry_out, load_task  # noqa: E402
from convergence.summary import Summary, TaskSummary, load, save, summarise_task  # noqa: E402
from convergence.tasks import IGNORED, TASKS, fold, with_few_labels  # noqa: E402
from convergence.training import (  # noqa: E402
    Key,
    labels_per_step,
    run,
    warmup_steps,
)
from rate_rule import (  # noqa: E402
    RULES,
    Condition,
    excess_at,
    factors_off,
    interpolated,
    left_out,
    table,
)


def searched(first, loss_of):
    """Carry a search out; returns all losses, in the order in which they were asked for."""
    losses = {}
    while rates := next_rates(first, losses):
        assert not losses.keys() & set(rates)
        losses |= {lr: loss_of(lr) for lr in rates}
    return losses


def parabola(best, width=1.0):
    """2 % worse than the best at `width` decades from it."""
    return lambda lr: 1 + 0.02 * (math.log10(lr / best) / width) ** 2


@pytest.mark.parametrize("first", [1e-4, 1e-3, 1e-2])
def test_search_finds_the_best_rate_from_wherever_it_begins(first):
    losses = searched(first, parabola(best=1e-3, width=0.4))
    assert abs(math.log10(best_rate(losses) / 1e-3)) <= 0.125 + 1e-9
    assert len(losses) <= 12


def test_search_widens_until_both_ends_are_out_of_the_usable_range():
    losses = searched(1e-3, parabola(best=1e-3, width=0.8))
    bound = 1.02 * min(losses.values())
    assert losses[min(losses)] > bound < losses[max(losses)]
    low, high = usable_range(losses)
    assert low == pytest.approx(10**-3.8, rel=0.12)
    assert high == pytest.approx(10**-2.2, rel=0.12)


def test_search_of_a_method_that_does_not_care_ends():
    losses = searched(1e-3, lambda lr: 1.0)
    assert min(losses) == rate(1e-3, -2 * MAX_STEPS_FROM_FIRST)
    assert max(losses) == rate(1e-3, 2 * MAX_STEPS_FROM_FIRST)


def test_search_goes_away_from_rates_that_diverge():
    losses = searched(1e-2, lambda lr: math.inf if lr > 2e-3 else parabola(1e-3, 0.4)(lr))
    assert best_rate(losses) < 2e-3
    assert usable_range(losses)[1] <= 2e-3


def test_search_goes_beyond_a_best_rate_that_an_earlier_run_had_outside_of_it():
    losses = {1e-3: 1.2, 3.2e-3: 2.0, 1e-2: math.inf, 5.6e-4: 1.0}
    assert next_rates(3.2e-3, losses) == [3.2e-4]
    assert next_rates(3.2e-3, losses | {3.2e-4: 1.1}) == []


def test_search_in_which_everything_diverges_ends():
    assert searched(1e-3, lambda lr: math.inf)


@pytest.mark.parametrize("first", [3.2e-4, 1e-3, 3.2e-3])
def test_search_among_neighbours_ends_between_two_worse_rates(first):
    losses = {}
    while rates := neighbouring_rates(first, losses):
        assert not losses.keys() & set(rates)
        losses |= {lr: parabola(1e-3)(lr) for lr in rates}
    assert best_rate(losses) == 1e-3
    assert {rate(1e-3, -1), rate(1e-3, 1), first} <= set(losses)
    assert len(losses) <= 5


def test_search_among_neighbours_ends_where_everything_diverges():
    losses = {}
    while rates := neighbouring_rates(1e-3, losses):
        losses |= dict.fromkeys(rates, math.inf)
    assert len(losses) == 3


def test_rates_of_the_grid_do_not_depend_on_the_way():
    assert [rate(1e-3, k) for k in range(5)] == [1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2]
    assert rate(3.2e-3, 1) == rate(1e-3, 3)


@pytest.mark.parametrize(
    ("aim", "steps"), [(5.0, 0.0), (3.0, 5.0), (2.0, 10.0), (1.5, 15.0), (0.5, None)]
)
def test_steps_to_a_loss_are_interpolated(aim, steps):
    assert steps_to([[0, 4.0, 0], [10, 2.0, 0], [20, 1.0, 0]], aim) == steps


def test_steps_to_a_loss_counts_the_first_time():
    assert steps_to([[0, 4.0], [10, 2.0], [20, 3.0], [30, 1.0]], 2.5) == 7.5


TINY = {
    "task": "digits",
    "pretraining": {
        "model": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "num_labels": 10,
        },
        "steps": 30,
        "batch_size": 32,
        "learning_rate": 1e-2,
    },
    "training": {"steps": 10, "batch_size": 16, "warmup_steps": 1, "evaluations": 5},
    "adapter": {"r": 2, "lora_alpha": 4},
    "n_calibration": 32,
    "n_test": 60,
}


ANYWHERE = {"target_modules": "all-linear", "modules_to_save": ["classifier"]}
"""Where the adapter goes, whatever the oldest and the newest versions call the layers of digits."""


def bench(command, folder, *more):
    """Run the script on the tiny task with plain LoRA and LoRA-GA."""
    options = ["--tasks", "tiny.yaml", "--methods", "lora", "lora_ga", "--jobs", "2", *more]
    script = SCRIPTS / "bench_convergence.py"
    done = subprocess.run(
        [sys.executable, str(script), command, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_study_goes_on_where_it_was_and_reports_itself(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert "is not over" in bench("report", tmp_path)
    searched = bench("run", tmp_path, "--only", "search")
    assert set(re.findall(r"seed (\d), (\d+) steps", searched)) == {("0", "10")}
    printed = bench("run", tmp_path)
    assert "digits lora_ga lr" in printed
    results = sorted(tmp_path.glob("out/convergence/results/digits/*/*/lr*.json"))
    assert {"lora", "lora_ga"} == {p.parent.name for p in results}
    runs = [json.loads(p.read_text()) for p in results]
    of_lora = {(r["seed"], r["steps"]) for r in runs if r["method"] == "lora"}
    # what has no calibration trains in its place, but for the search
    assert of_lora == {(s, n) for s in range(4) for n in (6, 12 if s else 10, 40)}
    results[0].unlink()
    again = bench("run", tmp_path)
    assert again.count("digits lora") == 1  # what was lost, and nothing else
    assert results[0].exists()
    bench("costs", tmp_path)
    assert bench("changes", tmp_path).count("digits lora") == 2
    assert "digits" not in bench("changes", tmp_path)  # nothing is measured twice
    report = bench("report", tmp_path)
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    assert [r.split(" | ")[0] for r in rows] == ["|", "| LoRA", "| **LoRA-GA**"]
    assert all(row.count(" | ") == len(COLUMNS) for row in rows)
    (kept,) = load(tmp_path / "out/convergence/summaries")
    for summary in kept.methods.values():
        assert set(summary.changes) == {"intruders", "size"}
        assert 0 <= summary.changes["intruders"] <= 10
        assert 0 < summary.changes["size"] < 10
    _, _, of_lora, _ = beside([kept]).splitlines()
    assert re.match(r"\| LoRA \| [\d.]+ \| 1.00 \| 1.00 \| [+-]\d.\d{3} ± \d.\d{3} \| ", of_lora)
    assert markdown([kept]) in report
    at_suggested = [r for r in runs if r["lr"] == kept.methods["lora_ga"].suggested_lr]
    study = Study(tmp_path / "out/convergence/results", str(tmp_path / "tiny.yaml"))
    study.path_of(Key("digits", "lora_ga", at_suggested[-1]["lr"], 3, 10)).unlink()
    cut_off = summarise_task(study, ["lora_ga"]).methods["lora_ga"]
    assert cut_off.suggested_losses == []  # not all seeds are there
    # seed 0 has chosen the rates; summaries have six digits
    reported = {float(f"{r['curve'][-1][1]:.6g}") for r in runs if r["seed"]}
    assert all(set(summary.losses) <= reported for summary in kept.methods.values())
    assert {len(summary.suggested_losses) for summary in kept.methods.values()} == {3}
    assert [len(summary.long_losses) for summary in kept.in_order().values()] == [3, 0]
    for name in ("rates_digits.png", "curves_digits.png"):
        assert (tmp_path / "out/convergence" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what PEFT's own starts say to everybody
@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].has_output])
def test_every_row_trains(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the pretrained model goes
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    task = TASKS["digits"](load_settings("tiny.yaml"))

    before, *_, after = run(Key("digits", method, 1e-2, 0, 8), task)["curve"]

    assert after[0] == 8
    assert after[1] < before[1]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_folds_test_every_row_once(n, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"folds": n}))
    task = TASKS["digits"](load_settings("tiny.yaml"))
    whole = sorted(image_bytes(task.train) + image_bytes(task.test))

    folds = [fold(task, seed) for seed in range(n)]

    assert sorted(i for part in folds for i in image_bytes(part.test)) == (
        whole if n > 1 else sorted(image_bytes(task.test))
    )
    for part in folds:
        assert sorted(image_bytes(part.train) + image_bytes(part.test)) == whole
    again = fold(task, n)
    assert torch.equal(again.test["labels"], folds[0].test["labels"])


def image_bytes(rows):
    return [image.numpy().tobytes() for image in rows["pixel_values"]]


@pytest.mark.parametrize(("name", "want"), [("digits", 2.54805), ("topics", 1.5132)])
def test_the_bases_that_were_pretrained_come_with_the_study(name, want, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = TASKS[name](load_settings(name))
    with torch.no_grad():
        loss = task.load_model()(**task.test).loss.item()
    assert not list(tmp_path.iterdir())  # nothing is pretrained
    exact = 1e-4 if name == "digits" else 0.02  # documentation differs between versions of Python
    assert loss == pytest.approx(want, abs=exact)


def test_settings_stay_where_they_are_when_a_field_is_added(tmp_path):
    keys = []
    for added in ({}, {"folds": 1}, {"folds": 2}):
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | added))
        keys.append(load_settings(str(tmp_path / "tiny.yaml")).key)
    assert keys[0] == keys[1] != keys[2]


def test_a_task_may_have_few_labels():
    """As many a row as asked for, none of them the first."""
    whole = load_task("topics")
    settings = whole.settings.model_copy(update={"labels_per_row": 3})
    few = with_few_labels(dataclasses.replace(whole, settings=settings))
    counted = few.train["labels"] != IGNORED
    assert set(counted.sum(1).tolist()) == {3}
    assert not counted[:, 0].any()
    assert torch.equal(few.train["labels"][counted], whole.train["labels"][counted])
    assert torch.equal(few.test["labels"], whole.test["labels"])
    assert labels_per_step(few) == 8 * 3
    assert with_few_labels(whole) is whole


@pytest.mark.parametrize("head_learning_rate", [None, 2e-4])
def test_a_head_has_its_own_rate_or_that_of_the_adapter(head_learning_rate, tmp_path, monkeypatch):
    training = TINY["training"] | {"head_learning_rate": head_learning_rate}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"training": training}))
    whole, rates = load_task(str(tmp_path / "tiny.yaml")), []
    task = dataclasses.replace(whole, adapter=ANYWHERE)
    made = METHODS["lora"].optimizer
    spied = dataclasses.replace(
        METHODS["lora"], optimizer=lambda m, lr, head: rates.append((lr, head)) or made(m, lr, head)
    )
    monkeypatch.setitem(METHODS, "lora", spied)
    run(Key("digits", "lora", 5e-3, 0, 2), task)
    assert rates == [(5e-3, head_learning_rate or 5e-3)]


def test_the_suggested_rate_is_that_of_the_search(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    study = Study(tmp_path, str(tmp_path / "tiny.yaml"))
    for seed, suggested in ((0, 1e-3), (1, 2e-3), (2, 3e-3)):
        key = Key("digits", "lora", 1e-2, seed, 10)
        study.save(key, {**dataclasses.asdict(key), "suggested_lr": suggested})
    assert study.suggested("lora") == 1e-3


@pytest.mark.parametrize(
    ("name", "momentum"),
    [
        ("lora+lora_muon", 0.9),
        ("lora_one_auto_output+lora_muon", 0.9),
        ("lora_one_ranks_dora+lora_muon", 0.9),
        ("muon_flat", 0.9),
        ("muon_output_0.8", 0.8),
        ("lora_output+lora_muon_0.8", 0.8),
    ],
)
def test_rows_of_lora_muon_keep_the_momentum_that_they_were_run_with(name, momentum):
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10)), LoraConfig(target_modules=["0"], r=4))
    optimizer = METHODS[name].optimizer(model, 1e-2, 1e-3)
    assert optimizer.param_groups[0]["momentum"] == momentum
    assert "+" not in name or f"momentum {momentum}" in METHODS[name].title


@pytest.mark.parametrize(
    ("name", "moment"), [("muon_annealed", "momentum"), ("annealed_kept", "exp_avg")]
)
def test_a_cut_of_ranks_takes_the_moments_along(name, moment):
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10)), LoraConfig(target_modules=["0"], r=4))
    optimizer = METHODS[name].optimizer(model, 1e-2, 1e-3)
    (pair,) = pairs(model)
    with torch.no_grad():
        pair.B.normal_()
    model(torch.randn(6, 12)).square().mean().backward()
    optimizer.step()
    G = torch.randn(10, 12)
    optimizer.state[pair.A][moment].copy_((pair.B.mT @ G).detach())
    optimizer.state[pair.B][moment].copy_((G @ pair.A.mT).detach())
    U, S, Vh = torch.linalg.svd((pair.B @ pair.A).detach())
    best = (U[:, :2] * S[:2]) @ Vh[:2]
    task = SimpleNamespace(settings=SimpleNamespace(adapter={"r": 2}))

    METHODS[name].change(model, optimizer, task, [])

    assert pair.B.shape == (10, 2)
    torch.testing.assert_close(pair.B @ pair.A, best)
    # as if the gradients had been of the new factors
    torch.testing.assert_close(optimizer.state[pair.A][moment], pair.B.mT @ G)
    torch.testing.assert_close(optimizer.state[pair.B][moment], G @ pair.A.mT)
    model(torch.randn(6, 12)).square().mean().backward()
    optimizer.step()
    assert torch.isfinite(pair.B).all()


def test_a_direction_that_the_base_lacks_is_an_intruder():
    base = torch.diag(torch.tensor([5.0, 4.0, 3.0, 0.0]))[:, :3]  # none along the last axis
    decomposed = truncated_svd(base, 3)
    new = base.clone()
    new[3, 0] = 20.0
    assert n_intruders(base, decomposed) == 0
    assert n_intruders(new, decomposed) == 1


def test_two_variants_of_a_task_keep_their_runs_apart(tmp_path, monkeypatch):
    studies = []
    for r in (2, 4):
        settings = TINY | {"adapter": {"r": r, "lora_alpha": 2 * r}}
        (tmp_path / f"r{r}.yaml").write_text(yaml.safe_dump(settings))
        studies.append(Study(tmp_path / "results", str(tmp_path / f"r{r}.yaml")))

    def run_at_once(task, key, device):
        del device
        loss = 1.0 if task.endswith("r2.yaml") else 2.0
        return {**dataclasses.asdict(key), "curve": [[key.steps, loss + abs(key.lr - 3e-3), 1.0]]}

    monkeypatch.setattr("convergence.study._run", run_at_once)
    monkeypatch.setattr(
        "convergence.study.ProcessPoolExecutor", lambda *a, **b: ThreadPoolExecutor(1)
    )

    carry_out(studies, ["lora"], 1, only="search")

    found = [{round(loss) for loss in study.search("lora").values()} for study in studies]
    assert found == [{1}, {2}]


@pytest.mark.parametrize(
    ("command", "tasks", "what"),
    [
        ("report", ("r2.yaml", "r4.yaml"), "one at a time"),
        ("publish", ("r2.yaml",), "names"),
    ],
)
def test_variants_are_neither_mixed_nor_published(
    command, tasks, what, tmp_path, monkeypatch, capsys
):
    for name in tasks:
        r = int(name[1])
        settings = TINY | {"adapter": {"r": r, "lora_alpha": 2 * r}}
        (tmp_path / name).write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_convergence.py", command, "--tasks", *tasks])
    with pytest.raises(SystemExit):
        bench_convergence.main()
    assert what in capsys.readouterr().err


def saved_run(study, method, lr, seed, steps, loss):
    key = Key("digits", method, lr, seed, steps)
    study.save(key, {**dataclasses.asdict(key), "curve": [[steps, loss, 0.5]]})


def test_longer_runs_begin_at_a_published_rate_and_join_what_is_published(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    rates = searched(3.2e-3, parabola(5.6e-3, 0.4))
    study = Study(tmp_path, str(tmp_path / "tiny.yaml"), {"lora": rates})
    published = summary_of(search=rates, losses=[0.3, 0.2, 0.1])
    earlier = TaskSummary("digits", "", 10, {"lora": published, "lora_ga": published})
    assert study.best("lora_ga") is None
    assert study.pending("lora_ga", "longer") == []
    asked = []
    while keys := study.pending("lora", "longer"):
        for key in keys:
            asked.append((key.lr, key.seed))
            saved_run(
                study, "lora", key.lr, key.seed, key.steps, parabola(3.2e-3)(key.lr) + key.seed
            )
            assert key.steps == 40

    together = summarise_task(study, ["lora", "lora_ga"], earlier)

    found = together.methods["lora"]
    assert asked[0] == (5.6e-3, 0)
    assert {lr for lr, seed in asked if seed} == {3.2e-3}  # its own best, not the published one
    assert (found.long_lr, found.long_losses) == (3.2e-3, [2.0, 3.0, 4.0])
    assert found.losses == published.losses
    assert together.methods["lora_ga"] == published
    header, _, row = longer([together]).splitlines()
    assert (header, row) == ("| | digits |", "| LoRA | 3.000 |")


def test_a_glance_says_percents_of_loras_loss_and_which_of_them_are_certain():
    losses = {"lora": [1.0, 1.1, 0.9], "dora": [0.9, 0.99, 0.81], "full": [0.8, 1.3, 0.81]}
    whole = {m: summary_of(search={}, losses=of) for m, of in losses.items()}
    tasks = [TaskSummary("digits", "", 10, whole)]
    tasks.append(TaskSummary("topics", "", 10, {m: whole[m] for m in ("lora", "dora")}))
    assert at_a_glance(tasks).splitlines() == [
        "| | digits | topics |",
        "|---|---|---|",
        "| full fine-tuning | -3.0% |  |",
        "| DoRA | **-10.0%** | **-10.0%** |",
    ]


def summary_of(**known):
    lists = ("accuracies", "short_losses", "suggested_losses", "forgetting")
    numbers = ("lr", "short_lr", "suggested_lr", "start_steps", "n_trained")
    empty = {name: [] for name in lists} | dict.fromkeys(numbers, 1.0)
    return Summary(**empty, usable=(1e-3, 1e-2), curve=[[0, 2.0], [12, 0.2]], **known)


def tiny_study(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return Study(tmp_path, str(tmp_path / "tiny.yaml"), SEARCHED)


SEARCHED = {
    method: searched(METHODS[method].first_rate, parabola(5.6e-3, 0.4))
    for method in ("lora", "lora_ga")
}


def save_whole_runs(study, method, losses, **facts):
    for seed, loss in zip(study.settings.reported, losses, strict=True):
        steps = study.trained(method)
        key = Key("digits", method, 5.6e-3, seed, steps)
        curve = [[0, 2.0, 0.1], [steps // 2, 1.0, 0.3], [steps, loss, 0.5]]
        result = {"source_loss": [None, None], "start_steps": 12.0 - steps, "n_trainable": 7}
        if loss is None:
            del curve[1]
        study.save(key, {**dataclasses.asdict(key), **result, "curve": curve, **facts})


def test_a_calibration_counts_as_steps(tmp_path):
    study = tiny_study(tmp_path)
    assert study.whole == 12  # 32 rows are read in two steps of 16
    assert (study.trained("lora"), study.trained("lora_ga")) == (12, 10)
    save_whole_runs(study, "lora", [0.3, 0.2, 0.1])
    save_whole_runs(study, "lora_ga", [0.3, 0.2, 0.1])
    task = summarise_task(study, ["lora_ga"])
    assert {m: s.steps for m, s in task.methods.items()} == {"lora": 12, "lora_ga": 12}
    assert task.steps == 12


def test_rows_of_an_earlier_study_are_kept_but_not_shown(tmp_path):
    study = tiny_study(tmp_path)
    save_whole_runs(study, "lora", [0.3, 0.2, 0.1])
    search = SEARCHED["lora_ga"]
    shorter = dataclasses.replace(summary_of(search=search, losses=[1.0]), curve=[[10, 1.0]])
    earlier = TaskSummary("digits", "", 10, {"lora": shorter, "lora_ga": shorter})
    task = summarise_task(study, [], earlier)
    assert list(task.in_order()) == ["lora"]
    assert task.searches()["lora_ga"] == search
    assert "LoRA-GA" not in markdown([task])


def test_what_has_no_new_runs_stays_published(tmp_path):
    study = tiny_study(tmp_path)
    save_whole_runs(study, "lora", [0.3, 0.2, 0.1])
    known = {"short_losses": [4.0], "long_losses": [3.0], "costs": {"start_seconds": 1.0}}
    known |= {"changes": {"size": 0.5}, "suggested_lr": 5.6e-3}
    earlier = dataclasses.replace(summary_of(search=SEARCHED["lora"], losses=[1.0]), **known)
    for lr in (5.6e-3, 1e-3):
        row = dataclasses.replace(earlier, lr=lr)
        found = summarise_task(study, [], TaskSummary("digits", "", 12, {"lora": row}))
        summary = found.methods["lora"]
        assert summary.losses == [0.3, 0.2, 0.1]
        assert (summary.short_losses, summary.long_losses) == ([4.0], [3.0])
        assert summary.costs == known["costs"]
        assert (summary.suggested_lr, summary.suggested_losses) == (5.6e-3, [0.3, 0.2, 0.1])
        assert summary.changes == (known["changes"] if lr == 5.6e-3 else {})


def test_runs_at_the_suggested_rate_join_a_published_row(tmp_path):
    study = tiny_study(tmp_path)
    row = summary_of(search=SEARCHED["lora"], losses=[1.0])
    published = dataclasses.replace(row, suggested_lr=1e-2, suggested_losses=[5.0, 5.0, 5.0])
    earlier = TaskSummary("digits", "", 10, {"lora": published})

    def found():
        return summarise_task(study, [], earlier).methods["lora"]

    assert found() == published
    key = Key("digits", "lora", 1e-3, 0, 10)
    of_search = {**dataclasses.asdict(key), "curve": [[10, 1.0, 0.5]], "suggested_lr": 2e-3}
    study.save(key, of_search)
    asked = found()
    assert (asked.suggested_lr, asked.suggested_losses) == (2e-3, [])  # not those of another rate
    for seed in study.settings.reported:
        saved_run(study, "lora", 2e-3, seed, study.trained("lora"), float(seed))
    assert found() == dataclasses.replace(
        published, suggested_lr=2e-3, suggested_losses=[1.0, 2.0, 3.0]
    )


def test_costs_of_calls_at_different_load_are_compared_as_steps_of_lora():
    costs = {"start_seconds": 2.0, "step_seconds": 0.6, "lora_step_seconds": 0.5}
    quiet = summary_of(search=SEARCHED["lora"], losses=[0.2], costs=costs)
    quiet = dataclasses.replace(quiet, accuracies=[0.5], start_steps=0.0)
    busy = dataclasses.replace(quiet, costs={name: 3 * value for name, value in costs.items()})
    task = TaskSummary("digits", "", 12, {"lora": quiet, "lora_ga": busy})
    head, *rows = [line.split(" | ") for line in markdown([task]).splitlines() if "| " in line]
    column = head.index("time to LoRA's loss, in its steps")
    assert [row[column] for row in rows] == ["18", "18"]  # 4 for the start, 12 steps of 1.2
    assert all("| 4.0 | 1.20 |" in line for line in beside([task]).splitlines()[2:])


def test_a_run_that_diverged_is_reported(tmp_path):
    study = tiny_study(tmp_path)
    save_whole_runs(study, "lora", [0.3, 0.2, 0.1])
    save_whole_runs(study, "lora_ga", [0.3, None, 0.1])
    task = summarise_task(study, ["lora_ga"])
    save(task, tmp_path / "kept")
    (kept,) = load(tmp_path / "kept")
    for of in (task, kept):
        assert of.methods["lora_ga"].losses == [0.3, math.inf, 0.1]
        assert "| inf |" in markdown([of])


def test_further_seeds_are_shown_beside_those_that_were_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = load_settings("digits")
    more = own.model_dump(mode="json", exclude_defaults=True) | {"seeds": 20}
    other = more | {"adapter": {"r": 1, "lora_alpha": 2}}
    for name, settings in (("more", more), ("other", other)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    studies = [Study(tmp_path, str(tmp_path / f"{n}.yaml")) for n in ("more", "other")]
    assert [further.differs_in_seeds(s.settings) for s in studies] == [True, False]
    assert not further.differs_in_seeds(own)
    study = studies[0]
    for method, lr, losses in (("dora", 1e-2, (0.5, 1.5)), ("lora", 3e-3, (1.0, 2.0))):
        for i, seed in enumerate(study.settings.reported):
            saved_run(study, method, lr, seed, study.whole, losses[i >= own.seeds])
    saved_run(study, "full", 1e-3, 4, study.whole, 0.1)  # the other seeds are not there
    further.save(further.collect(study), tmp_path / "kept")
    *_, of_lora, of_dora = further.table(further.load(tmp_path / "kept")).splitlines()
    assert of_lora == "| LoRA | 0.003 | 1.500 ± 0.240 |  | 2.000 ± 0.000 |  |"
    assert of_dora == (
        "| DoRA | 0.01 | 1.000 ± 0.240 | -0.500 ± 0.000 | 1.500 ± 0.000 | -0.500 ± 0.000 |"
    )

    elsewhere = Study(tmp_path / "elsewhere", study.task)
    for seed in study.settings.reported:
        saved_run(elsewhere, "full", 1e-3, seed, study.whole, 0.1)
        saved_run(elsewhere, "dora", 1e-2, seed, study.whole, 0.2)
    later = further.collect(elsewhere, further.load(tmp_path / "kept"))
    assert [(row.method, row.losses[0]) for row in later.rows] == [
        *(("lora", 1.0), ("full", 0.1), ("dora", 0.2))  # LoRA's are those that were kept
    ]


@pytest.mark.parametrize("facts", [{"data": "other"}, {"device": "cuda"}])
def test_rows_of_other_data_or_devices_are_not_compared(facts, tmp_path):
    study = tiny_study(tmp_path)
    save_whole_runs(study, "lora", [0.3, 0.2, 0.1], data="some", device="cpu")
    save_whole_runs(study, "lora_ga", [0.3, 0.2, 0.1], **{"data": "some", "device": "cpu"} | facts)
    with pytest.raises(SystemExit, match="rows of different data or devices"):
        summarise_task(study, ["lora_ga"])


def test_every_seed_has_random_factors_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    task = dataclasses.replace(TASKS["digits"](load_settings("tiny.yaml")), adapter=ANYWHERE)
    drawn = []

    def start(model, task, batches):
        adapted = METHODS["rslora"].start(model, task, batches)
        drawn.append(next(iter(pairs(adapted))).A.detach().clone())
        return adapted

    monkeypatch.setitem(METHODS, "lora", dataclasses.replace(METHODS["lora"], start=start))
    results = [run(Key("digits", "lora", 1e-3, seed, 1), task) for seed in (1, 2, 1)]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], drawn[1])
    assert {r["device"] for r in results} == {"cpu"}
    assert len({r["data"] for r in results}) == 1


def test_a_run_that_is_evaluated_at_its_end_only_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    task = dataclasses.replace(TASKS["digits"](load_settings("tiny.yaml")), adapter=ANYWHERE)
    whole, quick = (
        run(Key("digits", "rslora", 1e-2, 0, 4), task, at_end_only=quick) for quick in (False, True)
    )
    assert quick["train_losses"] == whole["train_losses"]
    assert quick["curve"] == whole["curve"][-1:]
    assert quick["data"] == whole["data"]
    assert whole["source_loss"][0] is not None
    assert quick["source_loss"] == [None, None]


@pytest.mark.parametrize(("n_steps", "warmup"), [(6, 0), (80, 5), (48, 4), (320, 20)])
def test_warmup_of_longer_runs_is_as_long_a_part(n_steps, warmup):
    assert warmup_steps(load_settings("docstrings").training, n_steps) == warmup


def test_rows_with_an_output_layer_are_for_language_models(tmp_path):
    tasks = {t: Study(tmp_path, t).has("lora_output") for t in ("digits", "docstrings", "topics")}
    assert tasks == {"digits": False, "docstrings": False, "topics": True}


def test_published_tables_are_those_of_the_published_figures():
    tasks = load(MEASURED)
    assert {"digits", "docstrings", "reference", "topics"} <= {task.task for task in tasks}
    for what, text in tables_of(tasks).items():
        begin, end = marks(what)
        page = page_of(what).read_text(encoding="utf-8")
        assert page.split(begin)[1].split(end)[0].strip() == text
    report = (MEASURED / "report.md").read_text(encoding="utf-8")
    assert report == markdown(tasks) + "\n"
    shown = re.findall(r"!\[[^]]+\]\((.+)\)", report)
    assert sorted(shown) == sorted(path.name for path in MEASURED.glob("*.png"))


MORE = {
    "full": math.inf,
    "full+muon": math.inf,
    "full+muon_0.8": math.inf,
    "dora": 1.13,
    "peft_eva": 1.02,
}
"""Rows that train more numbers than LoRA, which the page says: all of them, DoRA's magnitudes, PEFT's sum of ranks."""


def test_methods_of_the_study_at_equal_numbers_train_no_more_than_lora():
    for task in load(MEASURED):
        of_lora = task.methods["lora"].n_trained
        for method, summary in task.methods.items():
            assert summary.n_trained <= of_lora * MORE.get(method, 1.0), (task.task, method)


def _of_readme(summary):
    suggested = summary.suggested_loss
    return interval(summary.losses) + ("" if suggested is None else f", {suggested:.3f}")


def test_figures_of_the_readme_are_the_published_ones():
    tasks = load(MEASURED)
    rows = {}
    for method, info in METHODS.items():
        found = [task.in_order().get(method) for task in tasks]
        cells = [_of_readme(summary) if summary else "" for summary in found]
        rows[f"**{info.title}**" if info.ours else info.title] = cells
    readme = (SCRIPTS.parent / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## Does it help?")[2].partition("## ")[0]
    header, _, *shown = re.findall(r"^\|(.*)\|$", table, flags=re.MULTILINE)
    assert [cell.strip() for cell in header.split("|")] == ["", *(task.task for task in tasks)]
    assert len(shown) >= 5
    for row in shown:
        name, *cells = (cell.strip() for cell in row.split("|"))
        assert rows[name] == cells


def test_published_figures_have_all_seeds():
    for task in load(MEASURED):
        settings = load_settings(task.task)
        assert task.key == settings.key
        assert task.methods.keys() <= METHODS.keys()  # the tables show no others
        assert len(task.methods["lora"].suggested_losses) == settings.seeds
        for summary in task.methods.values():
            n = settings.seeds
            assert n == len(summary.losses) == len(summary.accuracies) >= 3
            assert {len(of) for of in (summary.short_losses, summary.long_losses)} <= {0, n}
            assert len(summary.suggested_losses) in (0, n)


def test_summaries_survive_their_files(tmp_path):
    for task in load(MEASURED):
        save(task, tmp_path)
    assert load(tmp_path) == load(MEASURED)
    rates = [list(summary.search) for task in load(MEASURED) for summary in task.methods.values()]
    assert all(of == sorted(of) for of in rates)  # lines of the pictures, drawn in this order


def test_products_of_half_precision_are_those_of_float32_rounded():
    torch.manual_seed(0)
    x, bias = torch.randn(6, 2, 40).bfloat16(), torch.randn(50).bfloat16()
    layer = torch.randn(50, 40).bfloat16()
    queries = x.view(1, 3, 4, 40)
    mask = torch.zeros(4, 4).bfloat16()
    with RoundedProducts():
        found = (
            nn.functional.linear(x, layer, bias),
            nn.functional.linear(x, layer),
            x @ x.mT,
            nn.functional.scaled_dot_product_attention(queries, queries, queries, mask),
        )
    wide, wide_queries = x.float(), queries.float()
    exact = (
        nn.functional.linear(wide, layer.float(), bias.float()),
        nn.functional.linear(wide, layer.float()),
        wide @ wide.mT,
        nn.functional.scaled_dot_product_attention(wide_queries, wide_queries, wide_queries),
    )
    for rounded, product in zip(found, exact, strict=True):
        assert rounded.dtype == torch.bfloat16
        # the order of a sum may tip one to the next number of bfloat16
        torch.testing.assert_close(rounded, product.bfloat16(), rtol=2**-7, atol=1e-6)


def test_full_fine_tuning_keeps_small_steps_of_weights_in_half_precision():
    """A rate of 1e-5 is below half of the last place of a bfloat16 of 0.05."""
    layer = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.constant_(layer.weight, 0.05)
    before = layer.weight.detach().float().clone()
    adapted = METHODS["full"].start(layer, SimpleNamespace(), [])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-5, weight_decay=0.0)
    adapted(torch.ones(1, 4, dtype=adapted.weight.dtype)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(adapted.weight, before - 1e-5, rtol=1e-6, atol=0)


def test_full_fine_tuning_with_muon_steps_as_torch_does(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 4)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    before = [p.detach().clone() for p in ours.parameters()]
    for model in (ours, theirs):
        model.get_output_embeddings = lambda: None
        for index, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
    muon(ours, 1e-2, 1e-3).step()
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    torch.optim.AdamW(vectors, lr=1e-2, weight_decay=0.0).step()
    for p, other, start in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert (p - other).norm() <= 0.02 * (other - start).norm() > 0  # bfloat16


def test_products_are_rounded_where_the_cpu_has_none_of_half_precision(monkeypatch):
    half, whole = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2)
    for has in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        assert isinstance(half_products(half), RoundedProducts) is not has
        assert not isinstance(half_products(whole), RoundedProducts)


def test_a_summary_keeps_earlier_rows_that_have_no_runs(tmp_path):
    earlier = next(task for task in load(MEASURED) if task.task == "digits")
    study = Study(tmp_path, "digits")
    assert earlier.key == study.settings.key
    assert summarise_task(study, ["lora", "dora"]) is None
    assert summarise_task(study, ["lora", "dora"], earlier).methods == earlier.methods


CONDITION = Condition(
    name="one",
    model="one",
    best=1e-2,
    factor=2.0,
    today=1e-2,
    width=64.0,
    r=8,
    scaling=2.0,
    steps=100,
    epochs=1.0,
    along=1e-2,
    largest=10.0,
    labels=1000.0,
)


def test_a_rule_is_held_against_the_models_that_it_was_not_fitted_on(tmp_path):
    """The best rate of one model is four times the rule's, where that of the others is the rule's."""
    others = [dataclasses.replace(CONDITION, name=n, model="other") for n in ("two", "three")]
    four = dataclasses.replace(CONDITION, best=4e-2)
    alone = left_out([four, *others], lambda c: c.today)
    assert alone["one"] == pytest.approx(4.0)
    assert alone["two"] == alone["three"] == pytest.approx(0.25)
    assert factors_off(alone) == pytest.approx((4.0, 4.0))
    table_of_rules = table([four, *others])
    assert table_of_rules.row_count == len(RULES)
    rate_rule.save([four, *others], tmp_path / "rates.json")
    kept = rate_rule.load(tmp_path / "rates.json")
    assert {c.name: c for c in kept} == {c.name: c for c in (four, *others)}


def test_the_best_rate_is_the_lowest_point_of_a_parabola():
    losses = {lr: 1 + math.log(lr / 2e-3) ** 2 for lr in (1e-4, 1e-3, 3.2e-3, 1e-2)} | {
        1.0: math.inf
    }
    assert interpolated(losses) == pytest.approx(2e-3)
    assert interpolated({1e-3: 1.0, 1e-2: 2.0}) == 1e-3  # an end


def test_a_loss_between_two_rates_is_read_from_both():
    losses = {1e-3: 2.0, 1e-2: 1.0, 1e-1: math.inf}
    assert excess_at(10**-2.5, losses) == pytest.approx(0.5)
    assert excess_at(1e-2, losses) == pytest.approx(0.0)
    assert excess_at(5e-2, losses) is None  # next to a run that diverged
    assert excess_at(1e-4, losses) is None


def test_optimisers_of_pairs_are_held_against_the_suggestion_for_the_same_start():
    task = next(t for t in load(MEASURED) if t.task == "topics")
    best = {lr: 1 + abs(math.log(lr / 2e-3)) for lr in (1e-4, 1e-3, 2e-3, 4e-3, 1e-1)}
    of_start = dataclasses.replace(task.methods["lora"], suggested_lr=1e-3)
    of_pro = dataclasses.replace(task.methods["lora+lora_pro"], search=best)
    some = dataclasses.replace(task, methods={"lora": of_start, "lora+lora_pro": of_pro})
    found = rate_rule.of_pairs([some])["lora_pro"]
    assert found.over_adamw == {"topics, lora": pytest.approx(2.0)}
    of_package = excess_at(1e-3 * rate_rule.SHARES["lora_pro"], best)
    assert found.worst_excess("topics") == of_package > 1
    assert rate_rule.of_pairs([some])["lora_rite"].over_adamw == {}


def test_curvature_is_that_of_a_known_loss():
    """A loss that is quadratic in `B` along Adam's first step: `A` is zero but for one entry."""

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2, bias=False)

        def forward(self, x, y):
            out = self.linear(x)
            return SimpleNamespace(loss=((out - y) ** 2).sum() / 2)

    base = Squares()
    with torch.no_grad():
        base.linear.weight.zero_()
    model = get_peft_model(base, LoraConfig(r=1, lora_alpha=1, target_modules=["linear"]))
    (pair,) = pairs(model)
    with torch.no_grad():
        pair.A.copy_(torch.tensor([[2.0, 0.0]]))
    batch = {"x": torch.tensor([[1.0, 0.0]]), "y": torch.tensor([[6.0, 2.0]])}
    found = rate_rule.curvature(model, [batch])
    # loss = ((2 b1 - 6)^2 + (2 b2 - 2)^2) / 2; its gradient (-12, -4), along (1, 1) the curvature 8
    assert found["along"] == pytest.approx(2.0, rel=1e-2)
    # d2/db2 = 4, and B and A are coupled by -(6, 2): the largest root of x^2 - 4 x - 40
    assert found["largest"] == pytest.approx(2 + 44**0.5, rel=0.05)


RATES_PAGE = SCRIPTS.parent / "docs" / "explanations" / "learning-rate.md"


def test_the_page_has_the_figures_of_the_optimisers_of_pairs():
    found = rate_rule.of_pairs(load(MEASURED))
    shown = RATES_PAGE.read_text("utf-8").partition("## Optimisers of pairs")[2]
    models = ["digits", "docstrings", "functions", "reference", "topics"]
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("| `")]
    assert rows == [rate_rule.row_of_page(name, of, models) for name, of in found.items()]


def test_the_page_has_the_figures_of_the_starts():
    found = rate_rule.of_starts(load(MEASURED))
    shown = RATES_PAGE.read_text("utf-8").partition("| start |")[2].partition("\n\n")[0]
    tasks = ["digits", "docstrings", "functions", "reference", "topics"]
    rows = [line[2:-2].split(" | ") for line in shown.splitlines()[2:]]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert rows == [rate_rule.row_of_start(name, of, tasks) for name, of in found.items()]
    assert len(rows) >= 7


def test_the_page_has_the_figures_of_the_rules():
    conditions = rate_rule.as_published(rate_rule.load(), load(MEASURED))
    shown = re.findall(
        r"^\| (.+) \| (\S+) times \| (\S+) times \|$",
        RATES_PAGE.read_text("utf-8"),
        flags=re.MULTILINE,
    )
    found = [
        rate_rule.factors_off(rate_rule.left_out(conditions, rule))
        for rule in rate_rule.RULES.values()
    ]
    assert len(shown) >= 5
    for title, *factors in shown:
        assert any(
            all(math.isclose(float(a), b, rel_tol=0.05) for a, b in zip(factors, of, strict=True))
            for of in found
        ), title
