"""The base model of an adapter is the one that the adapter names, at its revision."""

import torch
from peft import LoraConfig

from peft_gradinit.records import SavedAdapter
from peft_gradinit_cli.work.bases import model_section


def test_the_revision_is_that_of_the_model_that_is_named():
    config = LoraConfig(base_model_name_or_path="me/base", revision="abc123", task_type="SEQ_CLS")
    head = {"base_model.model.classifier.weight": torch.zeros(3, 8)}
    adapter = SavedAdapter("adapter", config, {}, head)
    named, other = (model_section(name, adapter) for name in ("me/base", "me/copy"))
    assert (named.revision, other.revision) == ("abc123", None)
    assert (named.task, named.n_labels) == ("SEQ_CLS", 3)
