"""Optimisers that know that `A` and `B` of a LoRA are a pair. One paper, one file.

Each is a `torch.optim.Optimizer` made from a model, `LoraMuon(model, lr=0.03, head_lr=1e-3)`, or by
Trainer, `Trainer(..., optimizer_cls_and_kwargs=optimizer("lora_muon", lr=0.03))`. They step the
adapters of this package and plain LoRA of PEFT, in one process, under DDP, and under FSDP2.
"""

from .base import PairOptimizer
from .lora_muon import LoraMuon
from .lora_one import LoraOne
from .lora_pro import LoraPro
from .lora_rite import LoraRite
from .table import OPTIMIZERS, optimizer
