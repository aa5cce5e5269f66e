"""How ms-swift 4.6.0 resolves its arguments for LoRA; names of modules stay as they are."""


def get_target_modules(args, model):
    return args.target_modules


def get_modules_to_save(args, model, task_type=None):
    return [*args.modules_to_save, *(["v_head"] if task_type == "SEQ_CLS" else [])]
