"""`trl sft` with an adapter whose start is computed: its options, and ours.

python trl_sft.py --config my_sft.yaml --method lora_ga
"""

import json
from dataclasses import dataclass
from typing import Any

from datasets import load_dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser
from trl import get_dataset, get_quantization_config

from peft_gradinit.integrations import callback_of, deferred_config


@dataclass
class StartArguments:
    """What a start needs to know."""

    method: str = "lora_one"  # lora_ga, eva, corda, pissa, milora, olora, svfit
    options: dict[str, Any] | str | None = None  # of the method and the callback, as JSON
    suggest_rate: bool = True  # train at the suggested learning rate, not at --learning_rate


kinds = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, StartArguments)
script, training, model, mixture, start = TrlParser(kinds).parse_args_and_config()
options = json.loads(start.options) if isinstance(start.options, str) else start.options or {}
options |= {"learning_rate": "suggested"} if start.suggest_rate else {}
of_trl = {
    "r": model.lora_r,
    "lora_alpha": model.lora_alpha,
    "lora_dropout": model.lora_dropout,
    "target_modules": model.lora_target_modules or "all-linear",
    "target_parameters": model.lora_target_parameters,
    "modules_to_save": model.lora_modules_to_save,
    "use_rslora": model.use_rslora,
    "use_dora": model.use_dora,
    "task_type": model.lora_task_type,
}
training.model_init_kwargs = {
    "revision": model.model_revision,
    "attn_implementation": model.attn_implementation,
    "dtype": model.dtype,
    **(training.model_init_kwargs or {}),
}
of_hub = {"name": script.dataset_config, "streaming": script.dataset_streaming}
data = load_dataset(script.dataset_name, **of_hub) if script.dataset_name else get_dataset(mixture)
trainer = SFTTrainer(
    model.model_name_or_path,
    args=training,
    train_dataset=data[script.dataset_train_split],
    eval_dataset=None if training.eval_strategy == "no" else data[script.dataset_test_split],
    quantization_config=get_quantization_config(model),
    peft_config=deferred_config(start.method, of_trl, options),
)
if callback := callback_of(trainer, options):
    trainer.add_callback(callback)
trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
trainer.save_model()
