"""A Trainer on the shared data, and the losses that it logged."""

from transformers import Trainer, TrainingArguments

from tests.helpers import pad, rows_of, token_batches


def trainer_of(model, directory, **options):
    values = {
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    rows = rows_of(token_batches())
    arguments = TrainingArguments(str(directory), **{**values, **options})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], data_collator=pad)


def losses_of(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
