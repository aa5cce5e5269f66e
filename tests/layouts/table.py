"""The layouts that the support table lists (`docs/support.md`); every row names the test that runs it.

To add one: a row here with the id of its test, `<file>::<function>`, and the same row in the page
(`tests/layouts/test_table.py` prints what it expects). Rows of `tests/layouts` are also keys of the
`LAYOUTS` of that file, which its tests are parametrised with.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layout:
    """A row.

    Attributes:
        key: short name, unique.
        title: what it is called in the page.
        made_by: how users get there.
        support: `"yes"`, with a note if need be, or what the error says.
        test: the test that runs it.
    """

    key: str
    title: str
    made_by: str
    support: str
    test: str

    @property
    def file(self) -> str:
        """The test's file, from the project's root."""
        return self.test.partition("::")[0]

    def row(self) -> str:
        """The row of the page."""
        return f"| {self.title} | {self.made_by} | {self.support} | `{self.file}` |"


_SHARDED = "tests/distributed/test_sharded.py::test_losses_are_those_of_the_whole_model"
_OFFLOADED = "tests/layouts/test_offloaded.py::test_every_method_starts_as_on_the_plain_base"
_BACKENDS = "tests/layouts/test_backends.py::test_the_start_is_that_of_the_dequantised_base"
_BITSANDBYTES = "tests/methods/test_quantized.py::test_the_start_is_that_of_the_dequantised_base"
_MODELS = "tests/layouts/test_models.py::test_captured_gradients_are_those_of_autograd"

ROWS = (
    Layout(
        "data_parallel",
        "several processes, one model each",
        "`torchrun`, `accelerate launch`, calibrated before DDP wraps the model",
        "yes",
        "tests/distributed/test_data_parallel.py::test_every_kind_of_loader_gives_the_factors_of_one_process",
    ),
    Layout(
        "trainer_ddp",
        "DDP in `Trainer`, by the callback",
        "`CalibrationCallback` under `torchrun`",
        "yes",
        "tests/distributed/test_data_parallel.py::test_the_callback_gives_the_start_and_the_losses_of_one_process",
    ),
    Layout(
        "fsdp2",
        "FSDP2",
        "`fully_shard` before or after the adapter; deferred: `initialize(model, data)`",
        "yes",
        _SHARDED,
    ),
    Layout(
        "fsdp1",
        "FSDP1",
        "`FullyShardedDataParallel` after the adapter, by PEFT's policy; deferred: `initialize(wrapped, data)`",
        "yes, with `use_orig_params=True`",
        _SHARDED,
    ),
    Layout(
        "native",
        "sharded by transformers",
        "`from_pretrained(distributed_config=DistributedConfig(fsdp_size=…))`",
        "yes",
        _SHARDED,
    ),
    Layout(
        "zero3",
        "ZeRO-3",
        "`zero.Init`, calibrated before `deepspeed.initialize`",
        "yes; inside an engine it is refused",
        _SHARDED,
    ),
    Layout(
        "tensor_parallel",
        "tensor parallel, with FSDP or alone",
        "`DistributedConfig(tp_size=…)`",
        "`calibrate`; PEFT 0.21's LoRA layers do not run there",
        "tests/distributed/test_tensor_parallel.py::test_factors_are_those_of_the_whole_model",
    ),
    Layout(
        "cpu",
        "offloaded to the CPU",
        '`cpu_offload`, `device_map` with `"cpu"`',
        "yes",
        _OFFLOADED,
    ),
    Layout(
        "disk",
        "offloaded to disk",
        '`disk_offload`, `device_map` with `"disk"`',
        "yes",
        _OFFLOADED,
    ),
    Layout(
        "mixed",
        "partly offloaded",
        "`dispatch_model`",
        "yes",
        _OFFLOADED,
    ),
    Layout(
        "auto",
        "partly offloaded, by `from_pretrained`",
        '`device_map="auto"`, `max_memory`, `offload_folder`',
        "yes",
        _OFFLOADED,
    ),
    Layout(
        "preloaded",
        "offloaded in whole blocks",
        "`preload_module_classes`",
        "refused, by name",
        "tests/layouts/test_offloaded.py::test_blocks_offloaded_as_one_piece_are_refused",
    ),
    Layout(
        "bitsandbytes",
        "bitsandbytes, 4 and 8 bits",
        "`BitsAndBytesConfig`",
        "yes",
        _BITSANDBYTES,
    ),
    Layout(
        "torchao_int8",
        "torchao int8, weight-only",
        "`TorchAoConfig(Int8WeightOnlyConfig())`",
        "yes",
        _BACKENDS,
    ),
    Layout(
        "torchao_float8",
        "torchao float8, weight-only",
        "`TorchAoConfig(Float8WeightOnlyConfig())`",
        "yes",
        _BACKENDS,
    ),
    Layout(
        "torchao_dynamic",
        "torchao int8, dynamic activations",
        "`TorchAoConfig(Int8DynamicActivationInt8WeightConfig())`",
        "its layers pass no gradient on: LoRA-GA and LoRA-One refuse, by name",
        "tests/layouts/test_backends.py::test_layers_that_pass_no_gradient_on_are_named",
    ),
    Layout("hqq", "HQQ, 4 bits", "`HQQLinear`", "yes, with targets by name", _BACKENDS),
    Layout(
        "quanto_int8",
        "optimum-quanto, 8 bits",
        '`QuantoConfig(weights="int8")`',
        "yes",
        _BACKENDS,
    ),
    Layout(
        "quanto_int4",
        "optimum-quanto, 4 bits",
        '`QuantoConfig(weights="int4")`',
        "yes",
        _BACKENDS,
    ),
    Layout(
        "other_backends",
        "GPTQ, AWQ, EETQ, AQLM, FP8Linear, …",
        "",
        "refused, by class name",
        "tests/layouts/test_backends.py::test_layers_of_other_backends_are_refused_by_class_name",
    ),
    Layout(
        "shared",
        "a layer used several times",
        "ALBERT",
        "yes: one adapter, the sum of its uses",
        _MODELS,
    ),
    Layout(
        "tied",
        "tied head as a target",
        "`tie_word_embeddings`",
        "yes, the start of its own use; `ensure_weight_tying` is refused",
        _MODELS,
    ),
    Layout("encoder_decoder", "encoder and decoder", "T5, BART", "yes", _MODELS),
    Layout("vision", "images", "ViT", "yes", _MODELS),
    Layout("two_towers", "two towers, own loss", "CLIP", "yes, with `loss_fn`", _MODELS),
    Layout(
        "sentences",
        "Sentence Transformers",
        "`SentenceTransformerTrainer` with the callback",
        "yes",
        "tests/trainer/test_sentences.py::test_padding_beside_longer_texts_does_not_change_the_start",
    ),
    Layout(
        "vision_language",
        "vision and language",
        "Llava",
        "yes; layers that the loss does not reach are named",
        _MODELS,
    ),
    Layout(
        "rows",
        "adapters by row of a batch",
        "`adapter_names=`",
        "yes; live SVFit refuses and says what can",
        "tests/peft_tools/test_tools.py::test_adapters_in_one_batch",
    ),
    Layout(
        "hotswap",
        "hot-swapping",
        "`hotswap_adapter`",
        "saved adapters: yes; into a live one: refused by PEFT, which names both types",
        "tests/peft_tools/test_tools.py::test_hot_swapping_of_loaded_adapters",
    ),
    Layout(
        "mixed_model",
        "several kinds of adapters in one model",
        "`PeftMixedModel`",
        "saved adapters: yes; live ones: refused by PEFT, by type",
        "tests/peft_tools/test_tools.py::test_mixed_model_takes_the_saved_form_and_names_the_live_one",
    ),
    Layout(
        "low_cpu_mem_usage",
        "empty adapters to be filled by loading",
        "`low_cpu_mem_usage=True`",
        "loading: yes; new adapters: refused, as a start needs memory",
        "tests/tuners/test_failures.py::test_low_cpu_mem_usage_is_refused_since_a_start_needs_memory",
    ),
    Layout(
        "state_dict",
        "a state dict with the live config",
        "transformers' `load_adapter(adapter_state_dict=…, peft_config=…)`, diffusers' scripts",
        "yes; SVFit says which config to pass",
        "tests/tuners/test_host.py::test_transformers_loads_a_state_dict_with_the_live_config",
    ),
)


def keys_of(test_file: str) -> list[str]:
    """Keys of the rows that a test file runs.

    Args:
        test_file: `__file__` of the test.

    Returns:
        The keys in the order of the table.
    """
    return [row.key for row in ROWS if test_file.replace("\\", "/").endswith(row.file)]
