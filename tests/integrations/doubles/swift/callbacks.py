"""The base of ms-swift 4.6.0's callbacks, and their table."""

import transformers


class TrainerCallback(transformers.TrainerCallback):
    def __init__(self, args, trainer):
        self.args = args
        self.trainer = trainer


callbacks_map = {}
