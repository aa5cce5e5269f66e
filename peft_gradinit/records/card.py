"""`README.md` of a saved adapter: how it started, how to load it, and its metadata for the Hub.

A card is there already when this module is called. That of PEFT and transformers is a form with
blanks, and is replaced. That of `Trainer` and TRL has the training's numbers. It is kept, as is
anything that users wrote, and gets a section.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..files import check_is_file, whole_file
from .hub import hub_id
from .names import CARD, PICTURE, PROVENANCE_FILE, base_class, label_count
from .picture import draw_layers
from .reading import read_dict
from .report import ModuleReport, by_parameter

_START, _END = "<!-- peft_gradinit: {} -->", "<!-- peft_gradinit: end of {} -->"
_GENERATED = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."


def complete_card(directory: Path, repo_id: str | None = None, *, above: bool = False) -> None:
    """Write an adapter's section into its card, in the place of an earlier one.

    Nothing happens in a directory without a `gradinit.json`, or where there is no card.

    Args:
        directory: of the adapter.
        repo_id: where the adapter goes.
        above: whether the card is in the directory above, where PEFT writes that of adapters of other
            names than `"default"`.
    """
    readme, name = directory / CARD, "default"
    if above and not readme.exists():
        readme, name = directory.parent / CARD, directory.name
    if not (directory / PROVENANCE_FILE).exists() or not readme.exists():
        return
    facts = _facts(directory)
    facts |= {"adapter": name, "repo_id": repo_id, "picture": _picture(directory, facts)}
    check_is_file(readme)
    card = ModelCard.load(readme)
    _fill_metadata(card.data, facts)
    # PEFT drops the end of the last line.
    card.text = _with_section(card.text, facts).rstrip() + "\n"
    with whole_file(readme) as beside:
        card.save(beside)


def remove_section(directory: Path) -> None:
    """Take an adapter's section and its tags out of its card; a card with nothing else goes.

    Args:
        directory: of the adapter.
    """
    readme = directory / CARD
    if not readme.exists():
        return
    check_is_file(readme)
    card = ModelCard.load(readme)
    start, end = (mark.format("default") for mark in (_START, _END))
    before, _, rest = card.text.partition(start)
    section, found, after = rest.partition(end)
    if not found:
        return
    if not any(map(_is_own_line, f"{before}{after}".splitlines())):
        readme.unlink()
        return
    card.text = f"{before.rstrip()}\n\n{after.strip()}\n"
    own = _own_tags(section.strip().partition("\n")[0].removeprefix("## "))
    card.data["tags"] = [tag for tag in card.data.get("tags") or [] if tag not in own]
    with whole_file(readme) as beside:
        card.save(beside)


def _is_own_line(line: str) -> bool:
    """Whether a line of a card, outside of our section, was written by a person or by `Trainer`."""
    ours = r"\s*|# .+ (adapter|model)( for .+)?|### Framework versions|- \S+ \d\S*"
    return re.fullmatch(ours, line) is None


def is_of_peft(readme: Path) -> bool:
    """Whether a card is one that PEFT has written or added to."""
    return readme.exists() and ModelCard.load(readme).data.get("library_name") == "peft"


def new_card(directory: Path) -> None:
    """Write the Hub's form of a card beside a transformers model; `complete_card` replaces it."""
    card = ModelCard.from_template(ModelCardData(library_name="transformers"))
    card.save(directory / CARD)


def _facts(directory: Path) -> dict[str, Any]:
    facts = read_dict(directory / PROVENANCE_FILE)
    config = directory / CONFIG_NAME
    saved = read_dict(config) if config.exists() else {}
    base = hub_id(saved.get("base_model_name_or_path"))
    base = base or facts["config"]["base_model_name_or_path"]
    target = facts.get("export", {}).get("target")
    known = {"saved": saved, "base": base, "target": target, "n_labels": _n_labels(directory)}
    return {**facts, **known}


def _n_labels(directory: Path) -> int | None:
    """Number of labels of the classification head that was trained with the adapter, if any."""
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if not path.exists():
        return None
    check_is_file(path)
    with safe_open(path, framework="pt") as file:
        names = [k for k in file.keys() if "lora_" not in k]  # noqa: SIM118
        return label_count({name: file.get_slice(name).get_shape() for name in names})


def _picture(directory: Path, facts: dict[str, Any]) -> bool:
    reported = (facts["report"] or {}).get("modules", ())
    lines = by_parameter(ModuleReport.from_dict(line) for line in reported)
    ranks = {line.name: line.r for line in lines}
    if not lines and facts["fingerprint"]:
        ranks = {name: r for name, (_, _, r) in facts["fingerprint"]["targets"].items()}
    energy = {line.name: line.captured_energy for line in lines}
    return draw_layers(directory / PICTURE, ranks, energy, f"{facts['method']}: start by layer")


# Metadata ---------------------------------------------------------------------------------------


def _fill_metadata(data: Any, facts: dict[str, Any]) -> None:
    merged = facts["target"] == "merged"
    data["library_name"] = "transformers" if merged else "peft"
    own = ["lora", *_own_tags(facts["method"])]
    tags = [t for t in data.get("tags") or [] if not t.startswith("base_model:adapter:")]
    if facts["base"]:
        own += [] if merged else [f"base_model:adapter:{facts['base']}"]
        data["base_model"] = facts["base"]
    elif hub_id(_one(data.get("base_model"))) is None:
        data.pop("base_model")  # a local path, which is private
    data["tags"] = sorted({*tags, *own})
    if facts["config"].get("task_type") == "CAUSAL_LM" and not data.get("pipeline_tag"):
        data["pipeline_tag"] = "text-generation"
    if facts.get("dataset") and not data.get("datasets"):
        data["datasets"] = [facts["dataset"]]


def _own_tags(method: str) -> list[str]:
    return [method.lower(), "peft_gradinit"]


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


# Text -------------------------------------------------------------------------------------------


def _with_section(text: str, facts: dict[str, Any]) -> str:
    start, end = (mark.format(facts["adapter"]) for mark in (_START, _END))
    section = f"{start}\n{_section(facts)}\n{end}"
    if _is_blank(text):
        versions = "".join(f"\n- {_NAMES.get(n, n)} {v}" for n, v in facts["versions"].items() if v)
        return f"\n# {_title(facts)}\n\n{section}\n\n### Framework versions\n{versions}\n"
    if start in text and end in text:
        before, _, rest = text.partition(start)
        return before + section + rest.partition(end)[2]
    for heading in ("## Training procedure", "### Framework versions"):
        before, found, rest = text.partition(f"\n{heading}")
        if found:
            return f"{before.rstrip()}\n\n{section}\n{found}{rest}"
    return f"{text.rstrip()}\n\n{section}\n"


_NAMED_CLASSES = 32
"""As many classes are named in the code that loads the adapter; more are in `gradinit.json` alone."""
_NAMES = {"peft": "PEFT", "transformers": "Transformers", "accelerate": "Accelerate"}


def _is_blank(text: str) -> bool:
    """Whether a card is the Hub's form as it is, with no text of anybody's own."""
    template = ModelCard.from_template(ModelCardData()).text.splitlines()
    own = [line for line in text.splitlines() if line.strip() and line not in template]
    known = ("### Framework versions", "- PEFT ", _GENERATED)
    return all(line.startswith(known) for line in own)


def _title(facts: dict[str, Any]) -> str:
    what = "model" if facts["target"] == "merged" else "adapter"
    return f"{facts['method']} {what}" + (f" for {facts['base']}" if facts["base"] else "")


def _section(facts: dict[str, Any]) -> str:
    about = facts.get("about") or {}
    lead = f"A LoRA adapter of `{facts['adapter']}`."
    if about.get("paper"):
        lead = (
            f"The adapter started from **{facts['method']}** "
            f"([arXiv:{about['paper']}](https://arxiv.org/abs/{about['paper']})), {about['start']}"
            ", computed by `peft_gradinit`."
        )
    parts = [f"## {facts['method']}", lead, _form(facts), _table(facts)]
    if facts["picture"]:
        folder = "" if facts["adapter"] == "default" else f"{facts['adapter']}/"
        parts.append(f"![Ranks, and energy not captured, by layer]({folder}{PICTURE})")
    parts += ["### Use", _usage(facts)]
    if not facts["base"]:
        parts.append(
            "The base model had no name on the Hub where this was saved, so the card cannot give "
            "it."
        )
    return "\n\n".join(part for part in parts if part)


def _form(facts: dict[str, Any]) -> str:
    if facts["target"] == "merged":
        return "It is merged into these weights: this is an ordinary transformers model."
    if facts["target"] == "serving":
        return (
            f"Exported for inference servers: rank {facts['export']['rank']} in all layers, the "
            "scale folded into the factors."
        )
    if _is_plain(facts):
        return "It is a plain LoRA adapter for the untouched base model and needs PEFT only."
    return "It is saved in a compact form that needs `peft_gradinit` to load."


def _is_plain(facts: dict[str, Any]) -> bool:
    return facts["saved"].get("peft_type") == "LORA"


def _table(facts: dict[str, Any]) -> str:
    rows = [*_rank_rows(facts), *_report_rows(facts["report"] or {})]
    errors = [x["relative_error"] for x in facts.get("export", {}).get("layers", ())]
    if any(errors):
        rows.append(("truncated", f"relative error of a layer at most {max(errors):.1e}"))
    if not rows:
        return ""
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _rank_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    saved, live_r = facts["saved"], facts["config"].get("r")
    if "r" not in saved:
        return []
    others = [r for r in (saved.get("rank_pattern") or {}).values() if isinstance(r, int)]
    ranks = str(saved["r"])
    if (facts.get("about") or {}).get("anchored") and "export" not in facts:
        ranks += f": the {live_r} that were trained, and as many that subtract their start"
    if others:
        ranks += f"; {len(others)} layers with their own, {min(others)} to {max(others)}"
    rows = [("rank", ranks)]
    if alpha := saved.get("lora_alpha"):
        rows.append(("lora_alpha", f"{alpha:g}" + (", rsLoRA" if saved.get("use_rslora") else "")))
    if isinstance(targets := saved.get("target_modules"), list) and len(targets) <= 12:
        rows.append(("target modules", ", ".join(f"`{t}`" for t in sorted(targets))))
    return rows


def _report_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    if not report:
        return []
    facts, modules, step = report["facts"], report["modules"], report.get("step")
    rows = []
    if facts:
        tokens = f"{facts['n_sequences']:,} sequences, {facts['n_tokens']:,} tokens"
        if facts["loss"] is not None:
            tokens += f" ({facts['loss_weight']:,.0f} with loss), loss {facts['loss']:.4f}"
        rows.append(("calibration", tokens))
    if step:
        losses = f"loss {step['loss_before']:.4f} to {step['loss_after']:.4f}"
        rows.append(("built-in step", f"{losses} on the calibration data"))
    energy = [m["captured_energy"] for m in modules if m["captured_energy"] is not None]
    if energy:
        middle = statistics.median(energy)
        spread = f"median {middle:.1%}, {min(energy):.1%} to {max(energy):.1%}"
        rows.append(("captured energy by layer", spread))
    fallbacks = sum(bool(m["fallback"]) for m in modules)
    if fallbacks:
        noted = f"{fallbacks} of {len(modules)}, see `{PROVENANCE_FILE}`"
        rows.append(("layers with a note", noted))
    return rows


def _usage(facts: dict[str, Any]) -> str:
    where = json.dumps(facts["repo_id"] or ".")
    note = "" if facts["repo_id"] else "  # this directory, or the name of its repository"
    auto = base_class(facts["config"]) or base_class(facts["saved"]) or "AutoModel"
    imported = f"from transformers import {auto}"
    if facts["target"] == "merged":
        return _python(imported, "", f"model = {auto}.from_pretrained({where}){note}")
    base = json.dumps(facts["base"] or "base-model")
    if auto.endswith("Classification") and facts["n_labels"]:
        base += f", {_head(facts)}, ignore_mismatched_sizes=True"
    base_note = "" if facts["base"] else "  # the model that the adapter was made for"
    folder = "" if facts["adapter"] == "default" else f', subfolder="{facts["adapter"]}"'
    code = _python(
        *([] if _is_plain(facts) else ["import peft_gradinit  # knows the compact form"]),
        "from peft import PeftModel",
        imported,
        "",
        f"model = {auto}.from_pretrained({base}){base_note}",
        *_padding(facts),
        f"model = PeftModel.from_pretrained(model, {where}{folder}){note}",
    )
    if facts["target"] != "serving":
        return code
    name = (facts["base"] or "base-model", facts["repo_id"] or ".")
    command = (
        f"vllm serve {name[0]} --enable-lora --max-lora-rank {facts['export']['rank']} "
        f"--lora-modules adapter={name[1]}"
    )
    return f"{code}\n\n```bash\n{command}\n```"


def _padding(facts: dict[str, Any]) -> list[str]:
    """The padding token that the adapted model had, which the checkpoint of a decoder may lack."""
    token = facts.get("padding")
    return [] if token is None else [f"model.config.get_text_config().pad_token_id = {token}"]


def _head(facts: dict[str, Any]) -> str:
    """What the loader of the base has to know of the head that the adapter brings."""
    classes = facts.get("classes") or ()
    if len(classes) != facts["n_labels"] or len(classes) > _NAMED_CLASSES:
        return f"num_labels={facts['n_labels']}"
    return f"id2label={dict(enumerate(classes))!r}"


def _python(*lines: str) -> str:
    code = "\n".join(lines)
    return f"```python\n{code}\n```"
