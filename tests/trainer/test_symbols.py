"""Everything of Transformers, Accelerate and TRL that the callback relies on exists, under its name."""

import inspect

import pytest
from accelerate import Accelerator
from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

METHODS = {
    "get_train_dataloader": "self",
    "compute_loss": "self model inputs return_outputs num_items_in_batch",
    "_prepare_inputs": "self inputs",
    "is_local_process_zero": "self",
}


@pytest.mark.parametrize("name", METHODS)
def test_trainer_has_the_method(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == METHODS[name].split()


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_online_trainers_are_told_by_their_buffer_and_count_in_training_step(cls):
    assert "self._buffered_inputs = None" in inspect.getsource(cls.__init__)
    assert "self._step += 1" in inspect.getsource(cls.training_step)


def test_accelerator_keeps_its_loaders_where_they_can_be_forgotten():
    accelerator = Accelerator(cpu=True)
    assert accelerator._dataloaders == []
    assert isinstance(accelerator.gradient_state.dataloader_references, list)
    assert type(accelerator.gradient_state).dataloader_references.fset is not None
