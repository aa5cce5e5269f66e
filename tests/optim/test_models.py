"""Models and adapters of every kind: each pair is stepped, and what is in no pair is AdamW's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_gradinit import SVFitConfig, initialize, pairs
from peft_gradinit.errors import ConfigError, NotInitializedError
from peft_gradinit.optim import LoraMuon, LoraOne, LoraPro
from tests.helpers import pico_gpt2, pico_llama, quiet, token_batches
from tests.methods.rows import started
from tests.moe.models import mixtral, starve
from tests.optim.rows import EXACT, ROWS, Toy, every_row, factors, loss_of, run, same, toy

EXPERTS = {
    "r": 2,
    "lora_alpha": 4,
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def train(model, optimizer, n=3):
    losses = []
    for step in range(n):
        loss = model(**token_batches()[step % 3]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def moved(model, optimizer, name="default", n=3):
    """Whether every factor has moved, and the loss fallen."""
    before = [f.detach().clone() for p in pairs(model, name) for f in (p.A, p.B)]
    losses = train(model, optimizer, n)
    after = [f for p in pairs(model, name) for f in (p.A, p.B)]
    assert all(f.isfinite().all() for f in after)
    return not any(torch.equal(a, b) for a, b in zip(before, after, strict=True)), losses


@every_row
@pytest.mark.parametrize("make", [pico_llama, pico_gpt2])
def test_linear_and_conv1d_layers(row, make):
    options = {"r": 4, "lora_alpha": 8, "use_rslora": True, "fan_in_fan_out": make is pico_gpt2}
    model = get_peft_model(make(), LoraConfig(target_modules="all-linear", **options))
    optimizer = row.make(model)
    scalings = {p.scaling for p in pairs(model)}
    assert set(optimizer.param_groups[0]["scalings"]) == scalings == {4.0}
    everything, _ = moved(model, optimizer)
    assert everything


def test_ranks_and_scalings_are_the_layers_own():
    """Pairs of one shape and different scalings are not stepped together."""
    patterns = {"alpha_pattern": {"first": 3}, "rank_pattern": {"third": 2}}
    model, alone = toy(dtype=torch.float64, **patterns), toy(dtype=torch.float64, **patterns)
    assert [p.scaling for p in pairs(model)] == [1.0, 2.0, 3.0]
    loss_of(model, 0).backward()
    LoraMuon(model, lr=0.03).step()
    gradients = toy(dtype=torch.float64, **patterns)
    loss_of(gradients, 0).backward()
    for pair, source in zip(
        pairs(alone), pairs(gradients), strict=True
    ):  # each by its own optimiser
        for other in pairs(alone):
            for factor in (other.A, other.B):
                factor.requires_grad_(other.name == pair.name)
                factor.grad = None
        pair.A.grad, pair.B.grad = source.A.grad, source.B.grad
        LoraMuon(alone, lr=0.03).step()
    for a, b in zip(factors(model), factors(alone), strict=True):
        torch.testing.assert_close(a, b)


STARTS = [("lora_ga", name) for name in ROWS] + [
    (method, "lora_muon") for method in ("lora_one", "eva", "pissa")
]


@pytest.mark.parametrize(("method", "name"), STARTS)
def test_starts_of_this_package(method, name):
    """The step is of the trainable factors; what an anchor subtracts stays."""
    row = ROWS[name]
    model = started(method)
    anchors = [a.clone() for p in pairs(model) for side in p.anchors() for a in side]
    everything, losses = moved(model, row.make(model), n=6)
    assert everything
    assert min(losses[3:]) < max(losses[:3])
    assert same(anchors, [a for p in pairs(model) for side in p.anchors() for a in side])


def test_a_deferred_adapter_is_stepped_once_it_is_started():
    model = started("lora_ga", calibration="deferred").train()
    optimizer = LoraMuon(model, lr=0.03)
    with pytest.raises(NotInitializedError):
        train(model, optimizer)
    initialize(model, quiet(token_batches()))
    everything, _ = moved(model, optimizer)
    assert everything


# Experts --------------------------------------------------------------------------------------------


def experts(dtype=torch.float32):
    model = get_peft_model(mixtral(), LoraConfig(**EXPERTS))
    torch.manual_seed(1)
    for pair in pairs(model):
        nn.init.normal_(pair.B, std=0.1)
    return model.to(dtype)


@every_row
@pytest.mark.filterwarnings("ignore")
def test_experts_are_blocks_of_their_own(row):
    """As if each expert had a pair to itself."""
    model = experts(torch.float64)
    (pair, *_) = pairs(model)
    assert pair.n_experts == 4
    for expert, (A, B) in enumerate(pair.matrices()):
        A.data.mul_(10.0**expert)  # one Gram matrix of all experts would mix them
        B.data.div_(10.0**expert)
    single = nn.ModuleList(nn.Linear(A.shape[1], B.shape[0]) for A, B in pair.matrices())
    apart = get_peft_model(
        nn.Sequential(*single), LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1", "2", "3"])
    ).double()
    pair.A.grad, pair.B.grad = torch.randn_like(pair.A), torch.randn_like(pair.B)
    of_A, of_B = pair.A.grad.unflatten(0, (4, -1)), pair.B.grad.unflatten(1, (-1, 4)).movedim(2, 0)
    for i, (one, (A, B)) in enumerate(zip(pairs(apart), pair.matrices(), strict=True)):
        one.A.data, one.B.data = A.detach().clone(), B.detach().clone()
        one.A.grad, one.B.grad = of_A[i].clone(), of_B[i].clone()
    for m in (model, apart):
        row.make(m, dampening=EXACT).step()
    for one, (A, B) in zip(pairs(apart), pair.matrices(), strict=True):
        torch.testing.assert_close(one.A, A)
        torch.testing.assert_close(one.B, B)


@every_row
@pytest.mark.filterwarnings("ignore")
def test_an_expert_that_no_token_reached_stands_still(row):
    model = experts()
    optimizer = row.make(model, weight_decay=0.1)
    train(model, optimizer, 2)
    starve(model.base_model.model, 1)
    (pair, *_) = (p for p in pairs(model) if "layers.0" in p.name)
    before = [[f.detach().clone() for f in matrices] for matrices in pair.matrices()]
    train(model, optimizer, 2)
    for expert, (old, new) in enumerate(zip(before, pair.matrices(), strict=True)):
        assert same(old, list(new)) == (expert == 1)


# Several adapters, frozen halves, other parameters ---------------------------------------------------


def two_adapters():
    model = toy()
    config = LoraConfig(r=2, target_modules=["first", "second"])
    model.add_adapter("other", config)
    return model


def test_an_adapter_of_another_name():
    model = two_adapters()
    model.set_adapter("other")
    assert len(LoraMuon(model, lr=0.1, adapter_name="other").param_groups[0]["params"]) == 4
    with pytest.raises(ConfigError, match=r"pairs of \['other'\] train as well"):
        LoraMuon(model, lr=0.1)
    model.set_adapter("default")
    with pytest.raises(ConfigError, match=r"pass adapter_name=\['other', 'default'\]"):
        LoraMuon(model, lr=0.1, adapter_name="other")
    alone = get_peft_model(Toy(), LoraConfig(r=2, target_modules=["first"]), "own")
    with pytest.raises(ConfigError, match=r"pass adapter_name=\['own'\], or freeze"):
        LoraMuon(alone, lr=0.1)  # there is no adapter named "default" to pass


def test_adapters_that_train_together():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    optimizer = LoraMuon(model, lr=0.03, adapter_name=["default", "other"])
    assert len(optimizer.param_groups[0]["params"]) == 10
    before = [
        f.detach().clone()
        for n in ("default", "other")
        for p in pairs(model, n)
        for f in (p.A, p.B)
    ]
    run(model, optimizer, 3)
    after = [f for n in ("default", "other") for p in pairs(model, n) for f in (p.A, p.B)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_row
def test_adapters_that_train_in_turn(row):
    """`set_adapter` freezes all others, also when the optimiser is made."""
    model = two_adapters()
    model.set_adapter("default")
    names = ["default", "other"]
    optimizer = row.make(model, adapter_name=names)
    assert len(optimizer.param_groups[0]["params"]) == 10
    for name in names:
        model.set_adapter(name)
        before = {n: [p.B.detach().clone() for p in pairs(model, n)] for n in names}
        run(model, optimizer, 2)
        moved = {n: not same(before[n], [p.B for p in pairs(model, n)]) for n in names}
        assert moved == {n: n == name for n in names}


@pytest.mark.parametrize("given", ["other", ["other"]])
def test_an_adapter_that_does_not_train_is_refused_alone(given):
    model = two_adapters()
    model.set_adapter("default")
    for pair in pairs(model):
        pair.A.requires_grad_(False), pair.B.requires_grad_(False)
    with pytest.raises(ConfigError, match="none of them trains"):
        LoraMuon(model, lr=0.1, adapter_name=given)


@every_row
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_frozen_factor_stays_and_the_other_takes_its_step(row, side):
    model, free = toy(dtype=torch.float64), toy(dtype=torch.float64)
    for pair in pairs(model):
        getattr(pair, side).requires_grad_(False)
    optimizer = row.make(model, dampening=EXACT)
    before = factors(model)
    for m, o in ((model, optimizer), (free, row.make(free, dampening=EXACT))):
        run(m, o, 1)
    still, moving = (0, 1) if side == "A" else (1, 0)
    assert same(before[still::2], factors(model)[still::2])
    run(model, optimizer, 2, first=1)
    assert same(before[still::2], factors(model)[still::2])
    assert not same(before[moving::2], factors(model)[moving::2])
    model = toy(dtype=torch.float64)
    for pair in pairs(model):
        getattr(pair, side).requires_grad_(False)
    run(model, row.make(model, dampening=EXACT), 1)
    if row.kind is not LoraPro:  # the step that it takes with the other one
        for a, b in zip(factors(model)[moving::2], factors(free)[moving::2], strict=True):
            torch.testing.assert_close(a, b)


def test_a_frozen_factor_of_half_precision_has_no_copy():
    model = toy(dtype=torch.bfloat16)
    for pair in pairs(model):
        pair.A.requires_grad_(False)
    optimizer, before = LoraOne(model, lr=1e-2), factors(model)
    run(model, optimizer, 2)
    assert same(before[::2], factors(model)[::2])
    assert not same(before[1::2], factors(model)[1::2])
    for pair in pairs(model):
        assert "master" in optimizer.state[pair.B]
        assert "master" not in optimizer.state[pair.A]


def test_dora_biases_and_heads_are_adamws():
    options = {"use_dora": True, "bias": "lora_only", "modules_to_save": ["head"]}
    model, other = toy(**options), toy(**options)
    optimizer = LoraOne(model, lr=0.0, head_lr=1e-2, head_weight_decay=0.1)
    mine = {id(f) for p in pairs(other) for f in (p.A, p.B)}
    rest = [p for p in other.parameters() if p.requires_grad and id(p) not in mine]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    run(model, optimizer, 4)
    run(other, adamw, 4)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("magnitude" in n for n in names)
    assert len(rest) == 3 + 3 + 2
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_magnitudes_of_convolutions_are_not_decayed():
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    config = LoraConfig(r=2, target_modules=["conv", "linear"], use_dora=True)
    model = get_peft_model(Images(), config)
    optimizer = LoraMuon(model, lr=0.03, head_lr=0.1, head_weight_decay=0.5)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {n: decays[id(p)] for n, p in model.named_parameters() if "magnitude" in n}
    assert list(found.values()) == [0.0, 0.0]
    of_conv = [p for n, p in model.named_parameters() if "conv.lora_A" in n]
    assert [decays[id(p)] for p in of_conv] == [0.5]


def bd_lora():
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(nblocks=2, match_strict=False, target_modules_bd_b=["k_proj"])
    return LoraConfig(r=4, target_modules=["q_proj", "k_proj"], use_bdlora=blocks)


def kasa():
    from peft.tuners.lora.config import KasaConfig

    return LoraConfig(r=4, target_modules=["q_proj"], kasa_config=KasaConfig())


@every_row
@pytest.mark.parametrize("config", [bd_lora, kasa])
@pytest.mark.filterwarnings("ignore")
def test_variants_with_other_products_are_refused(row, config):
    model = get_peft_model(pico_llama(), config())
    with pytest.raises(ConfigError, match=r"_proj adapts its weight in another way \((Bd|Ka)"):
        row.make(model, head_lr=1e-3)


def test_a_factor_in_two_pairs_is_refused():
    model = toy()
    first, second, _ = pairs(model)
    second.layer.lora_A["default"].weight = first.A
    with pytest.raises(ConfigError, match="LoRA-Muon: first and second share a factor"):
        LoraMuon(model, lr=0.03)


@pytest.mark.filterwarnings("ignore")
def test_a_factor_that_an_embedding_looks_into_is_refused():
    config = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    model = get_peft_model(pico_llama(tie_word_embeddings=True), config)
    with pytest.raises(ConfigError, match=r"share a factor, .* leave ensure_weight_tying out"):
        LoraMuon(model, lr=0.03, head_lr=1e-3)


def test_factors_of_embeddings_are_adamws():
    model = get_peft_model(pico_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    optimizer = LoraMuon(model, lr=0.03, head_lr=1e-2)
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 2]
    train(model, optimizer)


@pytest.mark.filterwarnings("ignore")
def test_quantized_bases_make_no_difference():
    torchao = pytest.importorskip("torchao.quantization")
    model = pico_llama()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    everything, _ = moved(model, LoraMuon(model, lr=0.03))
    assert everything


def test_svfit_has_no_pairs():
    model = get_peft_model(
        pico_llama(), SVFitConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with pytest.raises(ConfigError, match="nor has SVFit"):
        LoraMuon(model, lr=0.1)


def test_a_compiled_model_and_ddp_wrapper_names_are_found():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert len(LoraMuon(Wrapper(toy()), lr=0.1).param_groups[0]["params"]) == 6


def test_pairs_are_order_so_that_parameters_can_be_replaced():
    """As FSDP2 and Accelerate do between the making of the optimiser and its first step."""
    model, other = toy(), toy()
    optimizer = LoraMuon(other, lr=0.03)
    mine = [f for p in pairs(model) for f in (p.A, p.B)]
    optimizer.param_groups[0]["params"] = mine
    run(model, optimizer)
    plain = toy()
    run(plain, LoraMuon(plain, lr=0.03))
    assert same(factors(model), factors(plain))
    assert same(factors(other), factors(toy()))


def test_flattened_factors_are_refused_by_the_names_of_those_who_do_so():
    model = toy()
    optimizer = LoraMuon(model, lr=0.03)
    flat = nn.Parameter(torch.zeros(100))
    flat.grad = torch.zeros(100)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ConfigError, match=r"made for 3 pairs .* DeepSpeed, whose ZeRO .* FSDP1"):
        optimizer.step()


def test_shared_pairs_are_stepped_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Toy()

        def forward(self, x):
            return self.inner(x)

    model = get_peft_model(Twice(), LoraConfig(r=2, target_modules=["first"]))
    layer = model.base_model.model.inner.first
    model.base_model.model.inner.second = layer
    optimizer = LoraMuon(model, lr=0.03)
    assert len(optimizer.param_groups[0]["params"]) == 2
    run(model, optimizer)
