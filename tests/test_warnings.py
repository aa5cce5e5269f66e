"""Warnings point at the user's line, however deep in the hosts they are raised."""

import inspect
import warnings

import pytest
import torch
from peft import get_peft_model

from peft_gradinit import initialize
from tests.helpers import adapted, lora_ga, pico_llama, quiet, token_batches


def lines_of(function):
    lines, first = inspect.getsourcelines(function)
    return range(first, first + len(lines))


def lowered_rank():
    get_peft_model(pico_llama(), lora_ga(r=30))


def plain_start():
    model = pico_llama()
    model.model.layers[1].spare = torch.nn.Linear(48, 48)
    adapted(model, lora_ga(uncalibrated="lora"))


def through_initialize():
    model = pico_llama()
    model.model.layers[1].spare = torch.nn.Linear(48, 48)
    model = get_peft_model(model, lora_ga(uncalibrated="lora", calibration="deferred"))
    initialize(model, quiet(token_batches()))


def in_a_second_adapter():
    model = adapted(pico_llama(), lora_ga(r=2))
    model.add_adapter("second", lora_ga(r=30))


@pytest.mark.parametrize(
    "call", [lowered_rank, plain_start, through_initialize, in_a_second_adapter]
)
def test_the_warning_is_attributed_to_the_callers_file_and_line(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [w for w in caught if "LoRA-GA" in str(w.message)]
    assert ours
    for warning in ours:
        file = adapted if call is plain_start else call  # a helper of the tests makes that call
        assert warning.filename == inspect.getsourcefile(file)
        assert warning.lineno in lines_of(file)
