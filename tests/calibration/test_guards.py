"""The model and the process are left as they were found, whatever happens inside."""

import random
import threading

import accelerate
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from peft_gradinit.calibration import left_as_found
from tests.calibration.passes import gradients
from tests.guards import lived_in_model, random_states, snapshot
from tests.helpers import pad, pico_gpt2, pico_llama, rows_of, token_batches

ROWS = rows_of(token_batches(12))


def loader(**options):
    return DataLoader(ROWS, batch_size=4, collate_fn=pad, **options)


def raises(error):
    def loss_fn(model, batch):
        loss = model(**batch).loss
        random.random()
        np.random.rand()
        torch.rand(1)
        if len(batch["input_ids"]) == 2:  # the second batch
            raise error
        return loss

    return loss_fn


BATCHES = [pad(ROWS[:4]), pad(ROWS[4:6])]


def broken_data():
    yield BATCHES[0]
    raise OSError("disk")


def backward_error(model, batch):
    return Fails.apply(model(**batch).loss)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError


ENDINGS = {
    "success": (None, lambda: BATCHES, None),
    "success with loss_fn": (None, lambda: BATCHES, lambda model, batch: model(**batch).loss),
    "error in loss_fn": (ZeroDivisionError, lambda: BATCHES, raises(ZeroDivisionError())),
    "interrupt": (KeyboardInterrupt, lambda: BATCHES, raises(KeyboardInterrupt())),
    "error in the data": (OSError, broken_data, None),
    "error in the backward": (ArithmeticError, lambda: BATCHES, backward_error),
    "no data": (ValueError, list, None),
    "error in the model": (ValueError, lambda: [{"use_cache": False}], None),
}


@pytest.mark.parametrize("make", [pico_llama, pico_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
def test_everything_is_as_before(ending, make):
    error, data, loss_fn = ENDINGS[ending]
    model = lived_in_model(make)
    before = snapshot(model)
    if error is None:
        gradients(model, data(), loss_fn=loss_fn)
    else:
        with pytest.raises(error):
            gradients(model, data(), loss_fn=loss_fn)
    after = snapshot(model)
    assert [k for k in before if before[k] != after[k]] == []


def test_inside_the_block_nothing_is_random_and_nothing_is_cached():
    model = pico_gpt2().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with left_as_found(model, None, seed=0):
        in_train = [type(m).__name__ for m in model.modules() if m.training]
        assert "GPT2Block" in in_train
        assert not {"Dropout", "GPT2Attention", "GPT2LMHeadModel"} & set(in_train)
        assert model.config.use_cache is False
        keywords = model.transformer.h[0]._gradient_checkpointing_func.keywords
        assert keywords["use_reentrant"] is False


def order_read(model, data, seed=0):
    seen = []

    def loss_fn(model, batch):
        seen.extend(batch["input_ids"][:, :8].tolist())
        return model(**batch).loss

    gradients(model, data, loss_fn=loss_fn, seed=seed)
    return seen


def test_shuffling_loader_is_read_by_the_seed_and_leaves_global_randomness():
    model = pico_llama()
    before = random_states()
    first = order_read(model, loader(shuffle=True))
    torch.rand(3)
    assert order_read(model, loader(shuffle=True)) == first
    assert order_read(model, loader(shuffle=True), seed=1) != first
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    order_read(model, loader(shuffle=True))
    assert random_states() == before


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "prepared by accelerate"])
def test_a_loaders_own_generator_gets_its_state_back(wrap):
    generator = torch.Generator().manual_seed(5)
    data = loader(shuffle=True, generator=generator)
    if wrap:
        data = accelerate.Accelerator(cpu=True).prepare(data)
    before = generator.get_state()
    order_read(pico_llama(), data)
    assert torch.equal(generator.get_state(), before)
    # So training sees the batches that it would have seen without a calibration.
    untouched = loader(shuffle=True, generator=torch.Generator().manual_seed(5))
    for a, b in zip(data, untouched, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])


class _Drawn(torch.utils.data.Dataset):
    """Rows that are drawn when they are read, as augmented images are."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(0, 64, (8,))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "prepared by accelerate"])
@pytest.mark.parametrize("max_batches", [None, 1], ids=["read to the end", "left early"])
@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "in its second epoch"])
def test_workers_that_persist_draw_in_training_what_they_would_have_drawn(wrap, max_batches, begun):
    model, drawn = pico_llama(), []
    for passes in (0, 1):
        torch.manual_seed(7)
        data = DataLoader(_Drawn(), batch_size=4, num_workers=1, persistent_workers=True)
        if wrap:
            data = accelerate.Accelerator(cpu=True).prepare(data)
        if begun:
            list(data)
        for _ in range(passes):
            gradients(model, data, max_batches=max_batches)
        drawn.append([batch["input_ids"].tolist() for _ in range(2) for batch in data])
    assert drawn[0] == drawn[1]


def test_generator_of_a_nested_sampler_gets_its_state_back():
    generator = torch.Generator().manual_seed(5)
    sampler = torch.utils.data.RandomSampler(ROWS, generator=generator)
    batches = torch.utils.data.BatchSampler(sampler, 4, drop_last=False)
    before = generator.get_state()
    order_read(pico_llama(), DataLoader(ROWS, batch_sampler=batches, collate_fn=pad))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("max_batches", [None, 2], ids=["read to the end", "left early"])
def test_a_prepared_loader_reads_its_first_epoch_after_a_pass(max_batches):
    settings = accelerate.DataLoaderConfiguration(use_seedable_sampler=True)
    orders = []
    for passes in (0, 1):
        accelerate.utils.set_seed(0)
        data = accelerate.Accelerator(cpu=True, dataloader_config=settings).prepare(
            loader(shuffle=True)
        )
        before = data.gradient_state.dataloader_references
        for _ in range(passes):
            gradients(pico_llama(), data, max_batches=max_batches)
        assert data.gradient_state.dataloader_references == before
        orders.append([batch["input_ids"].tolist() for batch in data])
    assert orders[0] == orders[1]


def test_grad_and_inference_mode_of_the_caller_come_back_after_an_error():
    model = pico_llama()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            with pytest.raises(ZeroDivisionError):
                gradients(model, BATCHES, loss_fn=raises(ZeroDivisionError()))
            assert not torch.is_grad_enabled()
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert torch.is_grad_enabled()


def test_compiled_code_is_used_again_afterwards():
    model = pico_llama()
    with left_as_found(model, None, seed=0):
        pass
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    assert compilations


def test_two_threads_leave_the_random_state_as_it_was():
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    before = random_states()
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with left_as_found(models[0], None, 0):
            first_in.set()
            second_in.wait(0.5)
        first_out.set()

    def second():
        first_in.wait()
        with left_as_found(models[1], None, 0):
            second_in.set()
            assert first_out.wait(5)

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert random_states() == before


class Recurrent(nn.Module):
    """A recurrent layer behind a target; cuDNN runs its backward pass in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.proj = nn.Linear(16, 16)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, input_ids, labels):
        self.cudnn = torch.backends.cudnn.enabled
        logits = self.head(self.rnn(self.proj(self.embed(input_ids)))[0])
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recurrent_layers_run_without_cudnn_in_the_pass(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    model = Recurrent().to(device)
    ids = torch.randint(50, (4, 8))
    batch = {"input_ids": ids, "labels": ids}
    found = gradients(model, [batch], {"proj": model.proj})
    assert not model.cudnn
    assert torch.backends.cudnn.enabled
    model.train()
    model(ids.to(device), ids.to(device))["loss"].backward()
    assert model.cudnn
    exact = model.proj.weight.grad
    assert torch.allclose(found["proj"].to(exact), exact, rtol=1e-4, atol=1e-7)
