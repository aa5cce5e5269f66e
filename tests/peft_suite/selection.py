"""Which of PEFT's tests make an adapter from `LoraConfig`."""

import inspect


def uses(item, config_cls: type, plain_cls: type) -> bool:
    """Whether a test's parameters, or else its code, have the config that stands for LoRA.

    Args:
        item: the test.
        config_cls: what `peft.LoraConfig` is in these tests.
        plain_cls: what it was before.
    """
    parameters = list(_leaves(getattr(item, "callspec", None) and item.callspec.params))
    configs = [p for p in parameters if isinstance(p, type) or _is_config(p)]
    if configs:
        return any(
            c in (config_cls, plain_cls) or isinstance(c, (config_cls, plain_cls)) for c in configs
        )
    return "LoraConfig(" in _source(item).replace("AdaLoraConfig(", "")


def _leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _is_config(value) -> bool:
    return any(cls.__name__ == "PeftConfigMixin" for cls in type(value).__mro__)


def _source(item) -> str:
    return inspect.getsource(item.function)
