"""The base of ms-swift 4.6.0's tuners, and their table."""

from peft import PeftModel


class PeftTuner:
    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, **kwargs)

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        return PeftModel.from_pretrained(model, model_id, **kwargs)


tuners_map = {}
