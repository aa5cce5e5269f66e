"""`export_adapter`: each form is the function, on disk whole or not at all, with the model as it was."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_gradinit import SVFitConfig, export_adapter, files, load_for_training
from peft_gradinit.errors import AdapterError, ExportError, NotInitializedError
from peft_gradinit.export import check_export
from peft_gradinit.methods import METHODS
from peft_gradinit.recipes.embedded import pico_tokenizer
from peft_gradinit.records import read_adapter
from tests.exports import EXACT, PATTERNS, config, emptied, peft_lora, read, trained
from tests.helpers import (
    adapted,
    base_weights,
    logits,
    pico_gpt2,
    pico_llama,
    relative_error,
    same_weights,
    token_batches,
    train_steps,
)
from tests.moe.models import BOTH, mixtral, qwen3_moe

EVERY = [*(m.name for m in METHODS), "lora"]
every_method = pytest.mark.parametrize("method", EVERY)


def merged(directory, cls=LlamaForCausalLM):
    return cls.from_pretrained(directory).eval()


# Every form in a process that does not know this package ------------------------------------------

FRESH_PROCESS = """
import logging, sys, warnings

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_gradinit":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import torch
from pathlib import Path
from peft import PeftModel
from transformers import LlamaForCausalLM

said = []
class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("transformers").addHandler(Listener(logging.WARNING))
warnings.simplefilter("error", UserWarning)  # those of PEFT among them

root, ids, out = sys.argv[1:]
ids, got = torch.load(ids), {}
for directory in sorted(Path(root).iterdir()):
    if directory.name == "base":
        continue
    with torch.no_grad():
        if directory.name.endswith("merged"):
            got[directory.name] = [LlamaForCausalLM.from_pretrained(directory)(ids).logits]
            continue
        base = LlamaForCausalLM.from_pretrained(Path(root) / "base")
        via_peft = PeftModel.from_pretrained(base, directory)(ids).logits
        model = LlamaForCausalLM.from_pretrained(Path(root) / "base")
        model.load_adapter(str(directory))
        got[directory.name] = [via_peft, model(ids).logits]
assert not said, said
torch.save(got, out)
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All forms of adapters with ranks and scales of their own, and what another process makes of them."""
    directory = tmp_path_factory.mktemp("export")
    root, want = directory / "adapters", {}
    pico_llama().save_pretrained(root / "base")
    for method in EVERY:
        options = {} if method == "eva" else {"use_rslora": True, **PATTERNS}
        peft_model = emptied() if method == "eva" else trained(method, name="german", **options)
        for target in ("peft", "serving", "merged"):
            name = f"{method}-{target}"
            export_adapter(
                peft_model, root / name, target, None, next(iter(peft_model.peft_config))
            )
            want[name] = logits(peft_model)
    torch.save(token_batches(4, 4)[0]["input_ids"], directory / "ids.pt")
    paths = [str(root), str(directory / "ids.pt"), str(directory / "out.pt")]
    command = [sys.executable, "-c", FRESH_PROCESS, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, check=False)
    assert done.returncode == 0, done.stderr
    return want, torch.load(directory / "out.pt")


@pytest.mark.parametrize("target", ["peft", "serving", "merged"])
@every_method
def test_every_form_is_the_function_where_this_package_is_missing(method, target, everything):
    want, got = everything
    outputs = got[f"{method}-{target}"]
    assert len(outputs) == (1 if target == "merged" else 2)
    for output in outputs:
        assert relative_error(output, want[f"{method}-{target}"]) <= EXACT


# The forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "german"])
@every_method
def test_peft_is_what_save_pretrained_writes(method, name, tmp_path):
    peft_model = trained(method, name=name, **PATTERNS)
    report = export_adapter(peft_model, tmp_path / "out", adapter_name=name)
    peft_model.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved" / ("" if name == "default" else name)
    (content, tensors), (want_content, want) = read(tmp_path / "out"), read(saved)
    for values in (content, want_content):
        values["target_modules"] = sorted(values["target_modules"])  # PEFT writes a set
    assert content == want_content
    assert tensors.keys() == want.keys()
    assert all(torch.equal(tensors[key], want[key]) for key in want)
    assert {layer.name for layer in report.layers} == {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for key in want
        if "lora_A" in key
    }
    if method != "lora":
        live = load_for_training(pico_llama(), tmp_path / "out")
        assert torch.equal(logits(live), logits(peft_model))
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert re.findall(r"<!-- peft_gradinit: (\w+) -->", card) == ["default"]
        assert "german" not in card


def test_saved_config_has_no_options_that_old_versions_do_not_know(tmp_path):
    trained("lora_ga", use_rslora=True, **PATTERNS).save_pretrained(tmp_path)
    content, _ = read(tmp_path)
    assert not {"eva_config", "lora_ga_config", "peft_version", "use_dora"} & set(content)
    assert content["use_rslora"] is True
    trained("lora_ga", use_dora=True).save_pretrained(tmp_path / "dora")
    assert read(tmp_path / "dora")[0]["use_dora"] is True
    assert set(content) <= set(LoraConfig().to_dict())


@pytest.mark.parametrize("save_format", ["lora", "compact"])
def test_compact_svfit_is_served_and_merged_as_well(save_format, tmp_path):
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(pico_llama(), SVFitConfig(**options, save_format=save_format))
    train_steps(peft_model)
    want = logits(peft_model)
    export_adapter(peft_model, tmp_path / "peft")
    export_adapter(peft_model, tmp_path / "served", "serving")
    export_adapter(peft_model, tmp_path / "merged", "merged")
    assert peft_model.peft_config["default"].save_format == save_format
    expected = "LORA" if save_format == "lora" else "SVFIT"
    assert (
        json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == expected
    )
    served = PeftModel.from_pretrained(pico_llama(), tmp_path / "served")
    assert relative_error(logits(served), want) <= EXACT
    assert relative_error(logits(merged(tmp_path / "merged")), want) <= EXACT


@every_method
def test_truncation_to_a_sufficient_rank_is_exact_and_lower_ones_approach_it(method, tmp_path):
    peft_model = trained(method, use_rslora=True, **PATTERNS)
    want, distances = logits(peft_model), {}
    for rank in (1, 3, 14):
        report = export_adapter(peft_model, tmp_path / str(rank), rank=rank)
        plain = PeftModel.from_pretrained(pico_llama(), tmp_path / str(rank))
        assert all(layer.r["default"] <= rank for layer in lora_layers(plain))
        distances[rank] = relative_error(logits(plain), want)
        assert (report.largest_error == 0) == (rank == 14)
    assert distances[14] <= EXACT < distances[3] < distances[1]


@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor")  # PEFT's, of any bias
@pytest.mark.parametrize("method", ["lora_ga", "lora_one", "lora"])
def test_biases_of_factors_keep_their_scaling(method, tmp_path):
    options = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 12, "lora_bias": True}
    peft_model = get_peft_model(pico_llama(attention_bias=True), config(method, **options))
    train_steps(peft_model, 3, lr=0.1)
    export_adapter(peft_model, tmp_path / "out", rank=8)  # truncates nothing
    plain = PeftModel.from_pretrained(pico_llama(attention_bias=True), tmp_path / "out")
    assert relative_error(logits(plain), logits(peft_model.eval())) <= EXACT


def lora_layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]


def test_reported_errors_are_those_of_the_weights(tmp_path):
    peft_model = trained("lora_ga", use_rslora=True, **PATTERNS)
    report = export_adapter(peft_model, tmp_path / "out", rank=2)
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path / "out").base_model.model
    for line in report.layers:
        want = peft_model.base_model.model.get_submodule(line.name).get_delta_weight("default")
        got = plain.get_submodule(line.name).get_delta_weight("default")
        assert line.relative_error == pytest.approx(relative_error(got, want), rel=1e-3, abs=1e-6)
        assert line.exported_r == 2
    stored = json.loads((tmp_path / "out" / "gradinit.json").read_text())["export"]
    assert stored == json.loads(json.dumps(report.to_dict()))
    lines = str(report).splitlines()
    assert lines[0] == f"peft: 14 layers, rank 2, largest relative error {report.largest_error:.2e}"
    assert len(lines) == 2 + 1 + 14


def test_names_that_end_alike_keep_their_own_ranks(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
            self.b = nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a["b"](self.a["a"](x)))

    torch.manual_seed(0)
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    lora = LoraConfig(
        target_modules=["a.a", "b"], rank_pattern={"^b": 2}, init_lora_weights=False, r=4
    )
    peft_model, x = get_peft_model(net, lora), torch.randn(3, 8)
    export_adapter(peft_model, tmp_path / "out", rank=3)
    content, _ = read(tmp_path / "out")
    assert content["rank_pattern"] == {"^b": 2}
    fresh = Net()
    fresh.load_state_dict(before)
    plain = PeftModel.from_pretrained(fresh, tmp_path / "out")
    assert {
        n: m.r["default"] for n, m in plain.base_model.model.named_modules() if hasattr(m, "r")
    } == {
        "a.a": 3,
        "a.b": 3,
        "b": 2,
    }
    with torch.no_grad():
        assert relative_error(plain(x), peft_model(x)) < 1


def test_report_says_what_is_exact(tmp_path):
    peft_model = trained("eva")
    assert "every layer exact" in str(export_adapter(peft_model, tmp_path / "a", "serving"))
    report = export_adapter(peft_model, tmp_path / "b", "merged")
    assert str(report) == "merged: the base model with the adapter taken in"


# Merged ---------------------------------------------------------------------------------------------

MERGEABLE = {
    "dora": {"use_dora": True},
    "modules-to-save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("options", MERGEABLE.values(), ids=MERGEABLE.keys())
@pytest.mark.parametrize("method", ["lora_ga", "eva", "lora"])
def test_merging_holds_what_peft_can_merge(method, options, tmp_path):
    peft_model = trained(method, name="german", **options)
    export_adapter(peft_model, tmp_path / "out", "merged", adapter_name="german")
    assert relative_error(logits(merged(tmp_path / "out")), logits(peft_model)) <= EXACT


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=len)
@pytest.mark.parametrize("method", ["lora_ga", "eva", "lora"])
def test_every_parameter_of_experts_is_merged(method, targets, tmp_path):
    options = {"target_modules": ["q_proj"], "target_parameters": list(targets)}
    peft_model = trained(method, mixtral(), **options)
    peft_model.add_adapter("second", config(method, **{**options, "target_modules": ["v_proj"]}))
    want = logits(peft_model)
    before = base_weights(peft_model)
    export_adapter(peft_model, tmp_path / "out", "merged")
    assert relative_error(logits(merged(tmp_path / "out", type(mixtral()))), want) <= EXACT
    assert same_weights(before, base_weights(peft_model))
    peft_model.set_adapter("second")
    export_adapter(peft_model, tmp_path / "second", "merged", adapter_name="second")
    other = merged(tmp_path / "second", type(mixtral()))
    assert relative_error(logits(other), logits(peft_model)) <= EXACT


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("method", ["lora_one", "lora"])
def test_an_adapted_head_around_trained_tokens_is_merged(method, tmp_path):
    options = {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 5]}
    peft_model = trained(method, pico_llama(tie_word_embeddings=True), **options)
    export_adapter(peft_model, tmp_path / "out", "merged")
    model = merged(tmp_path / "out")
    assert relative_error(logits(model), logits(peft_model)) <= EXACT
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@every_method
def test_merging_only_reads_the_live_model(method, tmp_path):
    base = pico_llama()
    peft_model = trained(method, base)
    before, want = base_weights(peft_model), logits(peft_model)
    modules = [id(m) for m in peft_model.modules()]
    export_adapter(peft_model, tmp_path / "out", "merged")
    assert same_weights(before, base_weights(peft_model))
    assert torch.equal(logits(peft_model), want)
    assert [id(m) for m in peft_model.modules()] == modules
    train_steps(peft_model, 1)


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:fan_in_fan_out is set to True"
)
def test_merged_head_is_untied_where_the_base_ties_it(tmp_path):
    peft_model = trained("lora_ga", pico_gpt2(), target_modules=["c_attn", "lm_head"])
    export_adapter(peft_model, tmp_path / "out", "merged")
    model = merged(tmp_path / "out", type(pico_gpt2()))
    assert relative_error(logits(model), logits(peft_model)) <= EXACT
    assert torch.equal(model.transformer.wte.weight, pico_gpt2().transformer.wte.weight)
    assert peft_model.config.tie_word_embeddings is True
    assert model.config.tie_word_embeddings is False


def test_merged_model_stays_tied_where_the_adapter_leaves_the_head_alone(tmp_path):
    peft_model = trained("lora_ga", pico_gpt2(), target_modules=["c_attn"])
    export_adapter(peft_model, tmp_path / "out", "merged")
    model = merged(tmp_path / "out", type(pico_gpt2()))
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.transformer.wte.weight
    assert relative_error(logits(model), logits(peft_model)) <= EXACT


def test_other_adapters_are_not_merged_along(tmp_path):
    peft_model = trained("lora_ga")
    want = logits(peft_model)
    peft_model.add_adapter("second", config("lora_ga", r=2))
    peft_model.set_adapter("second")
    train_steps(peft_model, 2)
    export_adapter(peft_model, tmp_path / "out", "merged")
    assert relative_error(logits(merged(tmp_path / "out")), want) <= EXACT
    assert peft_model.active_adapter == "second"


def test_bf16_base_gives_a_bf16_model(tmp_path):
    peft_model = trained("lora_ga", pico_llama().bfloat16())
    export_adapter(peft_model, tmp_path / "out", "merged")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # The merged weights are rounded to bf16 once.
    assert relative_error(logits(model).float(), logits(peft_model).float()) <= 2**-5


def test_a_merged_model_has_its_tokenizer_and_is_replaced_with_it(tmp_path):
    """Files that an export says it wrote are its own; others keep a folder from being replaced."""
    peft_model, tokenizer = adapted(pico_llama()), pico_tokenizer()
    for _ in range(2):
        export_adapter(
            peft_model, tmp_path / "out", "merged", overwrite=True, processing_class=tokenizer
        )
    texts = ["one two", "three"]
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")(texts)["input_ids"]
        == tokenizer(texts)["input_ids"]
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    facts = json.loads((tmp_path / "out" / "gradinit.json").read_text())
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(facts["processing_files"]) < names
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"no export writes \(notes.txt\)"):
        export_adapter(peft_model, tmp_path / "out", "merged", overwrite=True)
    with pytest.raises(ExportError, match="takes the tokenizer of its base"):
        export_adapter(peft_model, tmp_path / "peft", processing_class=tokenizer)
    with pytest.raises(ExportError, match="save_pretrained, got a str"):
        export_adapter(peft_model, tmp_path / "new", "merged", processing_class="tokenizer")
    assert not (tmp_path / "new").exists()


def test_classifier_is_merged_with_its_head_and_its_card_builds_it(tmp_path):
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1}
    llama = LlamaConfig(vocab_size=96, num_attention_heads=4, num_labels=5, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(llama).eval()
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    peft_model = get_peft_model(base, lora).eval()
    torch.nn.init.normal_(peft_model.base_model.model.score.modules_to_save["default"].weight)
    export_adapter(peft_model, tmp_path / "merged", "merged")
    want = logits(peft_model)
    got = logits(merged(tmp_path / "merged", LlamaForSequenceClassification))
    assert relative_error(got, want) <= EXACT
    export_adapter(peft_model, tmp_path / "cut", rank=4)
    text = (tmp_path / "cut" / "README.md").read_text()
    line = 'AutoModelForSequenceClassification.from_pretrained("base-model", num_labels=5, '
    assert line in text


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`"
)
def test_encoder_decoder_with_an_adapted_tied_head_is_refused(tmp_path):
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    lora = LoraConfig(target_modules=["q", "lm_head"], init_lora_weights=False)
    peft_model = get_peft_model(base, lora)
    with pytest.raises(ExportError, match=r"computes something else once they are untied"):
        export_adapter(peft_model, tmp_path / "out", "merged")


def t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=96, decoder_start_token_id=0, **sizes))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("make", "targets"),
    [(t5, ["q", "v"]), (lambda: pico_llama(tie_word_embeddings=True), ["q_proj"])],
    ids=["T5", "Llama"],
)
def test_weights_that_a_checkpoint_holds_apart_stay_apart(make, targets, tmp_path):
    """As in T5 1.1, whose config ties them all the same."""
    torch.manual_seed(0)
    model = make()
    tensors = {k: v.clone() for k, v in model.state_dict().items() if "embed_tokens" not in k}
    if "shared.weight" not in tensors:
        tensors["model.embed_tokens.weight"] = model.model.embed_tokens.weight.detach().clone()
    tensors["lm_head.weight"] = torch.randn_like(tensors["lm_head.weight"])
    model.config.save_pretrained(tmp_path / "base")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base = type(model).from_pretrained(tmp_path / "base").eval()
    lora = LoraConfig(target_modules=targets, init_lora_weights=False)
    peft_model = get_peft_model(base, lora).eval()
    ids = torch.arange(1, 9)[None]
    want = peft_model(input_ids=ids, labels=ids).logits
    export_adapter(peft_model, tmp_path / "out", "merged")
    got = merged(tmp_path / "out", type(model))(input_ids=ids, labels=ids).logits
    assert relative_error(got, want) <= EXACT


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_text_model_within_another_is_untied_as_well(tmp_path):
    text = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    sizes = {"text_config": text, "vision_config": vision, "image_token_index": 95}
    base = LlavaForConditionalGeneration(LlavaConfig(**sizes)).eval()
    lora = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    peft_model = get_peft_model(base, lora).eval()
    want = logits(peft_model)
    export_adapter(peft_model, tmp_path / "out", "merged")
    model = merged(tmp_path / "out", LlavaForConditionalGeneration)
    assert relative_error(logits(model), want) <= EXACT
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    parts = (saved, saved["text_config"])
    assert not any(part.get("tie_word_embeddings", False) for part in parts)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_base_is_merged_with_its_own_weights(where, tmp_path):
    base, device = pico_llama(), torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(base, execution_device=device)
    else:
        accelerate.disk_offload(base, str(tmp_path / "weights"), execution_device=device)
    peft_model = trained("pissa", base, target_modules=["q_proj", "down_proj"])
    want = logits(peft_model)
    export_adapter(peft_model, tmp_path / "out", "merged")
    assert relative_error(logits(merged(tmp_path / "out")), want) <= EXACT
    assert torch.equal(logits(peft_model), want)


def test_what_cannot_be_merged_is_refused(tmp_path):
    peft_model = trained("eva")
    peft_model.merge_adapter()
    with pytest.raises(ExportError, match=r"\['default'\] are merged into .*unmerge_adapter\(\)"):
        export_adapter(peft_model, tmp_path / "out", "merged")
    net = nn.Sequential(nn.Linear(4, 4))
    peft_model = get_peft_model(net, LoraConfig(target_modules=["0"]))
    with pytest.raises(ExportError, match=r"transformers models, got a Sequential; use merge_and"):
        export_adapter(peft_model, tmp_path / "out", "merged")
    assert list(tmp_path.iterdir()) == []


def _with_a_bias(model):
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size)


def _with_another_module(model):
    model.extra = nn.Linear(3, 3)


def _with_a_buffer(model):
    model.model.register_buffer("steps", torch.zeros(1))


def _with_a_deeper_head(model):
    size = model.config.hidden_size
    model.lm_head = nn.Sequential(nn.Linear(size, size), nn.Linear(size, model.config.vocab_size))


def _with_fewer_layers(model):
    model.model.layers = model.model.layers[:1]


def _with_more_tokens(model):
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size + 3, bias=False)


CHANGED = {
    _with_a_bias: "lm_head.bias is not read",
    _with_another_module: "extra is not read",
    _with_a_buffer: "model.steps is not read",
    _with_a_deeper_head: "lm_head.weight is missing; lm_head.0 is not read",
    _with_fewer_layers: "model.layers.1 is missing",
    _with_more_tokens: r"lm_head.weight has shape \(67, 16\), not \(64, 16\)",
}


@pytest.mark.parametrize(
    ("change", "said"), CHANGED.items(), ids=lambda c: getattr(c, "__name__", "")
)
def test_a_model_that_its_class_would_not_read_is_refused(change, said, tmp_path):
    """What the class of its config has no place for would be left out of the file."""
    model = pico_llama(vocab_size=64, hidden_size=16)
    change(model)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for write in (check_export, functools.partial(export_adapter, directory=tmp_path / "out")):
        with pytest.raises(ExportError, match=rf"{said}.*merge_and_unload\(\)"):
            write(model, target="merged")
    assert not list(tmp_path.iterdir())


def test_dropout_and_composed_weights_are_no_other_model(tmp_path):
    model = pico_llama()
    model.model.dropout = nn.Dropout(0.1)
    layer = model.model.layers[0].mlp.down_proj
    nn.utils.parametrizations.weight_norm(layer)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    export_adapter(model, tmp_path / "out", "merged")
    assert torch.allclose(logits(merged(tmp_path / "out")), logits(model), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor\\(s\\) have invalid shape")
def test_a_bias_that_the_base_has_no_place_for_is_refused(tmp_path):
    options = {"r": 2, "target_modules": ["q_proj"], "lora_bias": True, "task_type": "CAUSAL_LM"}
    with pytest.warns(UserWarning, match="bias"):
        model = get_peft_model(pico_llama(), LoraConfig(**options))
    said = r"lora_bias=True gives .*q_proj a bias.*target='peft'"
    with pytest.raises(ExportError, match=said):
        check_export(model, "merged")
    with pytest.raises(ExportError, match=said):
        export_adapter(model, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()
    export_adapter(model, tmp_path / "out", "peft")
    biased = LlamaForCausalLM(
        LlamaConfig(**pico_llama().config.to_dict() | {"attention_bias": True})
    )
    export_adapter(get_peft_model(biased, LoraConfig(**options)), tmp_path / "merged", "merged")


def test_quantised_base_is_not_merged(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = pico_llama()
    linear = model.model.layers[0].self_attn.q_proj
    quantised = bnb.nn.Linear8bitLt(48, 48, bias=False, has_fp16_weights=False)
    quantised.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False).to("cpu")
    model.model.layers[0].self_attn.q_proj = quantised
    peft_model = get_peft_model(model, peft_lora(target_modules=["v_proj"]))
    with pytest.raises(ExportError, match=r"q_proj is quantised, .*Load the base unquantised"):
        export_adapter(peft_model, tmp_path / "out", "merged")
    peft_model.base_model.model.model.layers[0].self_attn.q_proj = linear
    peft_model.base_model.model.model.layers[0].self_attn.v_proj.base_layer = quantised
    with pytest.raises(ExportError, match=r"v_proj is quantised, .*Load the base unquantised"):
        export_adapter(peft_model, tmp_path / "out", "merged")


# Whole or not at all --------------------------------------------------------------------------------


def test_directory_is_new_empty_or_replaced_as_a_whole(tmp_path):
    peft_model, out = trained("eva"), tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    export_adapter(peft_model, out, "merged")
    with pytest.raises(ExportError, match=r"holds an export already \(README.md, .*overwrite=True"):
        export_adapter(peft_model, out)
    export_adapter(peft_model, out, overwrite=True)
    names = {path.name for path in out.iterdir()}
    assert "adapter_config.json" in names
    assert not {"config.json", "model.safetensors"} & names
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777


def test_other_peoples_files_are_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match=r"holds files that no export writes \(thesis.tex\)"):
            export_adapter(trained("lora"), tmp_path, overwrite=overwrite)
    with pytest.raises(ExportError, match=r"thesis\.tex' is not a directory"):
        export_adapter(trained("lora"), tmp_path / "thesis.tex")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ExportError, match=r"link' is not a directory"):
        export_adapter(trained("lora"), tmp_path / "link")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def content_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("target", ["peft", "serving", "merged"])
def test_failure_halfway_leaves_the_files_as_they_were(target, tmp_path, monkeypatch):
    peft_model, out = trained("lora_ga"), tmp_path / "out"
    export_adapter(peft_model, out, target)
    before = content_of(out)
    train_steps(peft_model, 1)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_gradinit.records.card.ModelCard.save", full_disk)
    monkeypatch.setattr("peft.peft_model.ModelCard.save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_adapter(peft_model, out, target, overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        export_adapter(peft_model, tmp_path / "new", target)
    assert content_of(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_of_the_last_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    peft_model, out = trained("eva"), tmp_path / "out"
    export_adapter(peft_model, out)
    before = content_of(out)
    rename = type(out).rename

    def fails_for_the_new_one(self, target):
        if self.name == "new" and not target.exists():
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="Input/output error"):
        export_adapter(peft_model, out, "serving", overwrite=True)
    assert content_of(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_everything_is_flushed_before_it_appears(tmp_path, monkeypatch):
    flushed, flush = [], files._flush

    def record(path):
        flushed.append((path.name, (tmp_path / "out").exists()))
        flush(path)

    monkeypatch.setattr(files, "_flush", record)
    export_adapter(trained("eva"), tmp_path / "out")
    before = {name for name, visible in flushed if not visible}
    assert {path.name for path in (tmp_path / "out").iterdir()} <= before
    assert flushed[-1] == (tmp_path.name, True)


# Wrong calls ----------------------------------------------------------------------------------------


def test_wrong_options_are_refused_with_what_was_got(tmp_path):
    peft_model = trained("eva")
    wrong = {
        r"target must be one of \('peft', 'serving', 'merged'\), got 'vllm'": ("vllm",),
        r"rank must be a positive integer or None, got 0": ("peft", 0),
        r"rank must be a positive integer or None, got 2\.0": ("serving", 2.0),
        r"'merged' writes no factors that rank=2 could truncate": ("merged", 2),
        r"no adapter 'french'; the model has \['default'\]": ("peft", None, "french"),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ExportError, match=message):
            export_adapter(peft_model, tmp_path / "out", *arguments)
    with pytest.raises(ExportError, match=r"expects a PeftModel, got LlamaForCausalLM; pass what"):
        export_adapter(pico_llama(), tmp_path / "out")
    ada = get_peft_model(pico_llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    with pytest.raises(ExportError, match=r"writes LoRA adapters.*use save_pretrained") as caught:
        export_adapter(ada, tmp_path / "out", "serving")
    assert isinstance(caught.value, ValueError)
    assert list(tmp_path.iterdir()) == []


def test_deferred_adapter_is_not_exported(tmp_path):
    peft_model = get_peft_model(pico_llama(), config("lora_ga", calibration="deferred"))
    for target in ("peft", "serving", "merged"):
        with pytest.raises(NotInitializedError, match="nothing to save"):
            export_adapter(peft_model, tmp_path / "out", target)
    assert list(tmp_path.iterdir()) == []


def test_factors_of_a_base_that_was_written_to_are_not_cut(tmp_path):
    options = {"r": 4, "target_modules": ["q_proj"]}
    for more, named in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"kasa_config": KasaConfig()}, "kasa_config"),
    ):
        peft_model = get_peft_model(pico_llama(), LoraConfig(**options, **more))
        with pytest.raises(ExportError, match=rf"{named} has changed the base.*leave rank out"):
            export_adapter(peft_model, tmp_path / "out", rank=2)
        with pytest.raises(ExportError, match=rf"{named} has changed the base.*servers load"):
            export_adapter(peft_model, tmp_path / "out", "serving")
    export_adapter(peft_model, tmp_path / "kasa")
    with pytest.raises(AdapterError, match="is a KaSA adapter, whose start has changed the base"):
        read_adapter(tmp_path / "kasa")


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.attn(x, x, x)[0])


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"attn": 2}}, {"alpha_pattern": {"attn": 32}}], ids=str
)
def test_the_output_of_torchs_attention_has_the_rank_and_scale_of_its_module(
    patterns, rank, tmp_path
):
    def make():
        torch.manual_seed(3)
        return Attends().eval()

    lora = LoraConfig(target_modules=["attn", "fc"], r=4, init_lora_weights=False, **patterns)
    peft_model, x = get_peft_model(make(), lora).eval(), torch.randn(2, 3, 16)
    export_adapter(peft_model, tmp_path / "out", rank=rank)
    got, want = PeftModel.from_pretrained(make(), tmp_path / "out").eval()(x), peft_model(x)
    assert relative_error(got, want) <= EXACT
    with pytest.raises(ExportError, match=r"entries attn\.base_layer\.out_proj"):
        export_adapter(peft_model, tmp_path / "serving", "serving")


@pytest.mark.parametrize("names", [["gate_up_proj"], ["experts.gate_up_proj", "down_proj"]])
def test_parameters_may_be_named_without_their_module(names, tmp_path):
    options = {"target_modules": ["q_proj"], "init_lora_weights": False, "r": 2}
    lora = LoraConfig(target_parameters=names, **options)
    peft_model = get_peft_model(qwen3_moe(), lora).eval()
    report = export_adapter(peft_model, tmp_path / "out")
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"q_proj"}
    reloaded = PeftModel.from_pretrained(qwen3_moe(), tmp_path / "out").eval()
    assert relative_error(logits(reloaded), logits(peft_model)) <= EXACT
    assert read_adapter(tmp_path / "out").layers.keys() == {layer.name for layer in report.layers}


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_base_in_a_folder_is_found_from_an_export(options, name, tmp_path):
    pico_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, lora, name)
    export_adapter(peft_model, tmp_path / "out", adapter_name=name, **options)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_layers_that_a_truncation_cannot_reach_are_named(tmp_path):
    peft_model = get_peft_model(pico_llama(), peft_lora(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(
        ExportError, match=r"truncates linear layers, .*lora_embedding_A.*leave rank"
    ):
        export_adapter(peft_model, tmp_path / "out", rank=2)


def test_tensors_of_an_export_are_readable_by_safetensors_alone(tmp_path):
    export_adapter(trained("lora_ga"), tmp_path / "out", "serving")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "again.safetensors")


def test_the_example_of_the_guide_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "guides" / "export.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    exec(code, {"model": trained("lora_ga"), "tokenizer": pico_tokenizer()})
    assert "peft: 14 layers" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "served", "small"]
