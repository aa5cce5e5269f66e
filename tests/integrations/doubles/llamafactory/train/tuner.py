"""A run of LLaMA-Factory 0.9.5 from a saved adapter; the optimiser is the plainest."""

import torch

from ..data import SFTDataCollatorWith4DAttentionMask, get_dataset
from ..hparams import get_train_args
from ..model import load_model, load_tokenizer


def run_exp(args=None, callbacks=None):
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(args)
    module = load_tokenizer(model_args)
    rows = get_dataset(None, model_args, data_args, training_args, stage="sft", **module)
    model = load_model(module["tokenizer"], model_args, finetuning_args, is_trainable=True)
    collator = SFTDataCollatorWith4DAttentionMask(
        template=None, model=model, label_pad_token_id=-100, block_diag_attn=False,
        neat_packing=False, attn_implementation=None, compute_dtype=None, **module,
    )  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training_args.learning_rate)
    for step in range(training_args.max_steps):
        batch = [rows["train_dataset"][i] for i in range(4 * step, 4 * step + 4)]
        model(**collator(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(training_args.output_dir)
