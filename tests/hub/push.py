"""Publish adapters with the real client; runs in a process of its own, against `HF_ENDPOINT`.

python push.py <directory for results>
"""

import json
import os
import sys
import urllib.request
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_gradinit import export_adapter
from tests.exports import config, trained
from tests.helpers import logits, pico_llama, token_batches, train_steps

OUT = Path(sys.argv[1])
BASE = "me/pico-llama"
WANT = {}


def plan(stage, how, times):
    """Let the server fail."""
    body = json.dumps({"stage": stage, "how": how, "times": times}).encode()
    return ask(urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/_hub", data=body))


def ask(request=None):
    """What the server has."""
    url = request or f"{os.environ['HF_ENDPOINT']}/_hub"
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def remote_base():
    """The base model, loaded by its name."""
    return LlamaForCausalLM.from_pretrained(BASE).eval()


def rows(n=8):
    """Training data for `Trainer`."""
    ids = [batch["input_ids"][0, :6].tolist() for batch in token_batches(n, 1, 12)]
    return Dataset.from_list([{"input_ids": i, "labels": i} for i in ids])


def push_models():
    """Every method from the PeftModel, on a base that has a name."""
    for method in ("lora_ga", "lora_one", "eva", "svfit"):
        options = {} if method == "eva" else {"use_rslora": True}
        peft_model = trained(method, remote_base(), **options)
        peft_model.push_to_hub(f"me/{method}")
        WANT[method] = logits(peft_model)
    return peft_model


def push_local_base():
    """From a base that was loaded from a directory of this machine."""
    pico_llama().save_pretrained(OUT / "secret-place")
    peft_model = trained("lora_ga", LlamaForCausalLM.from_pretrained(OUT / "secret-place").eval())
    peft_model.push_to_hub("me/local-base")
    WANT["local-base"] = logits(peft_model)


def push_two_adapters():
    """One of another name beside the first."""
    peft_model = trained("lora_ga", remote_base(), name="german")
    peft_model.push_to_hub("me/named")
    WANT["named"] = logits(peft_model)


def push_twice():
    """A second push goes to the card that is there, and keeps what people wrote into it."""
    peft_model = trained("lora_one", remote_base())
    peft_model.push_to_hub("me/twice")
    from huggingface_hub import ModelCard

    card = ModelCard.load("me/twice")
    card.text += "\n## Intended use\n\nPoetry.\n"
    card.push_to_hub("me/twice")
    train_steps(peft_model, 1)
    peft_model.push_to_hub("me/twice")
    WANT["twice"] = logits(peft_model.eval())


def push_with_failures():
    """The connection breaks, the server errs, the commit is refused; then it works."""
    peft_model = trained("eva", remote_base(), r=3)  # content that the server does not have yet
    log = []
    for stage, how in (("lfs", 403), ("commit", 403)):
        plan(stage, how, 100)
        try:
            peft_model.push_to_hub("me/failing")
            log.append("no error")
        except Exception as error:  # noqa: BLE001 whatever the client raises
            log.append(f"{type(error).__name__}: {error}")
        plan(stage, None, 0)
        log.append(ask()["repos"]["me/failing"])
    plan("preupload", 500, 1)  # the client tries this again by itself
    peft_model.push_to_hub("me/failing")
    log.append(ask()["repos"]["me/failing"])
    WANT["failing"] = logits(peft_model)
    return log


def push_from_trainer():
    """`Trainer.push_to_hub`, and the pushes of its checkpoints."""
    peft_model = get_peft_model(remote_base(), config("lora_ga"))
    arguments = TrainingArguments(
        str(OUT / "trainer"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        hub_model_id="me/trainer", push_to_hub=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(peft_model, arguments, train_dataset=rows())
    trainer.train()
    plan("lfs", "drop", 1)  # the connection breaks within an upload
    trainer.push_to_hub()
    WANT["trainer"] = logits(peft_model.eval())


def push_from_sft_trainer(tokenizer):
    """TRL writes the card; the model's own push completes it."""
    peft_model = get_peft_model(remote_base(), config("eva"))
    arguments = SFTConfig(
        str(OUT / "sft"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        hub_model_id="me/sft", push_to_hub=True, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(peft_model, arguments, train_dataset=rows(), processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    trainer.model.push_to_hub("me/sft")
    WANT["sft"] = logits(trainer.model.eval())


def push_exports():
    """Exported directories go up as they are."""
    from huggingface_hub import HfApi

    peft_model = trained("lora_ga", remote_base())
    for target in ("serving", "merged"):
        export_adapter(peft_model, OUT / target, target)
        HfApi().create_repo(f"me/{target}")
        HfApi().upload_folder(repo_id=f"me/{target}", folder_path=OUT / target)
        WANT[target] = logits(peft_model)


def tokenizer():
    """Words as numbers, for TRL."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(96)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0")


def main():
    pico_llama().push_to_hub(BASE)
    push_models()
    push_local_base()
    push_two_adapters()
    push_twice()
    log = push_with_failures()
    push_from_trainer()
    push_from_sft_trainer(tokenizer())
    push_exports()
    torch.save(WANT, OUT / "want.pt")
    torch.save(token_batches(4, 4)[0]["input_ids"], OUT / "ids.pt")
    (OUT / "failures.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main()
