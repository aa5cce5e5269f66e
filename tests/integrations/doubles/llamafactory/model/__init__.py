"""Models of LLaMA-Factory 0.9.5, which continue from `adapter_name_or_path`."""

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_tokenizer(model_args):
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    return {"tokenizer": tokenizer, "processor": None}


def load_model(tokenizer, model_args, finetuning_args, is_trainable=False, add_valuehead=False):
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    if not is_trainable:
        return model.requires_grad_(False).eval()
    folder = model_args.adapter_name_or_path
    return PeftModel.from_pretrained(model, folder, is_trainable=True)
