"""LLaMA-Factory 0.9.5 leaves a frozen vision tower out, by the names of modules or of all layers."""


def patch_target_modules(model, finetuning_args, target_modules):
    names = [n for n, _ in model.named_modules() if n.split(".")[-1] in target_modules]
    towers = [n for n in names if "vision_tower" in n]
    if not (towers and finetuning_args.freeze_vision_tower):
        return target_modules
    return [n for n in names if n not in towers]
