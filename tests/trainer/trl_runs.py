"""Small runs of TRL's trainers: a Llama, a tokenizer and data, all made in the process."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

from peft_gradinit import EvaConfig, LoraGAConfig, LoraOneConfig, SVFitConfig
from tests.helpers import VOCABULARY, pico_llama, quiet, token_batches

SHARED = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONFIGS = {
    "LoRA-GA": (LoraGAConfig, {"r": 4, "lora_alpha": 8}),
    "LoRA-One": (LoraOneConfig, {"r": 4, "lora_alpha": 8}),
    "EVA": (EvaConfig, {"r": 4, "lora_alpha": 8, "rank_allocation": "uniform"}),
    "SVFit": (SVFitConfig, {"r": 4}),
}


def config_of(method, calibration="deferred", **options):
    """A small config of any method; SVFit takes no calibration."""
    config_cls, own = CONFIGS[method]
    values = {**SHARED, **own, **options}
    return (
        config_cls(**values) if method == "SVFit" else config_cls(**values, calibration=calibration)
    )


def data():
    return quiet(token_batches())


def tokenizer():
    """Words `w0` … and three special tokens; a chat template that marks the assistant's words."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + ' <eos> ' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    )
    return made


def words(start, n):
    return " ".join(f"w{(start * 7 + 5 * i + i * i) % (VOCABULARY - 3)}" for i in range(n))


def texts(n=12):
    return Dataset.from_dict({"text": [words(i, 6 + i % 7) for i in range(n)]})


def dialogues(n=12):
    return Dataset.from_list([
        {
            "messages": [
                {"role": "user", "content": words(i, 4)},
                {"role": "assistant", "content": words(i + 3, 5 + i % 3)},
            ]
        }
        for i in range(n)
    ])


def completions(n=12):
    return Dataset.from_dict({
        "prompt": [words(i, 4) for i in range(n)],
        "completion": [" " + words(i + 3, 5 + i % 3) for i in range(n)],
    })


def preferences(n=12):
    return Dataset.from_dict({
        "prompt": [words(i, 4) for i in range(n)],
        "chosen": [" " + words(i + 3, 5 + i % 3) for i in range(n)],
        "rejected": [" " + words(i + 8, 4 + i % 4) for i in range(n)],
    })


def judged(n=12):
    return Dataset.from_dict({
        "prompt": [words(i, 4) for i in range(n)],
        "completion": [" " + words(i + 3, 5 + i % 3) for i in range(n)],
        "label": [i % 2 == 0 for i in range(n)],
    })


def prompts(n=12):
    return Dataset.from_dict({"prompt": [words(i, 4) for i in range(n)]})


def reward(completions, **_):
    return [float(len(set(text.split()))) + text.count("w1") for text in completions]


KINDS = {
    "sft": (SFTTrainer, SFTConfig, texts, {}),
    "dpo": (DPOTrainer, DPOConfig, preferences, {}),
    "kto": (KTOTrainer, KTOConfig, judged, {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        prompts,
        {"num_generations": 2, "max_completion_length": 6, "beta": 0.1},
    ),
}


def trainer_of(kind, directory, model=None, dataset=None, **options):
    """A trainer of TRL, ready to train for a few steps.

    `peft_config` among the options goes to the trainer, everything else to its arguments.
    """
    trainer_cls, config_cls, default_data, own = KINDS[kind]
    peft_config = options.pop("peft_config", None)
    values = {
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = config_cls(str(directory), **{**values, **own, **options})
    extra = {"reward_funcs": reward} if kind == "grpo" else {}
    return trainer_cls(
        model=model or pico_llama(),
        args=arguments,
        train_dataset=dataset or default_data(),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **extra,
    )


def losses_of(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
