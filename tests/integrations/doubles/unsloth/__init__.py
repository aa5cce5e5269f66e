"""The one function of unsloth 2026.10 that the plug-in calls, with its published signature."""


class FastLanguageModel:
    @staticmethod
    def patch_peft_model(model, use_gradient_checkpointing="unsloth"):
        model._unsloth_gradient_checkpointing = use_gradient_checkpointing
        return model
