"""`peft-gradinit calibrate`: a model, data, and a result directory."""

from pathlib import Path
from typing import Annotated

import typer

from . import methods, options


def calibrate(
    model: Annotated[str, typer.Argument(help="Hub name, folder, or embedded:pico-llama.")],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Hub name, folder, .jsonl, .json, .parquet, .csv, .txt, or embedded:docstrings."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Argument(help="Folder of the result.")] = None,
    method: Annotated[
        str, typer.Option(help=methods.HELP, rich_help_panel=options.ADAPTER)
    ] = "lora_ga",
    r: Annotated[int, typer.Option("--r", min=1, rich_help_panel=options.ADAPTER)] = 8,
    target_modules: Annotated[
        str,
        typer.Option(
            help="As in LoraConfig; several names are separated by commas.",
            rich_help_panel=options.ADAPTER,
        ),
    ] = "all-linear",
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Further field of the method's config, KEY=VALUE; can be repeated.",
            rich_help_panel=options.ADAPTER,
        ),
    ] = None,
    task: options.Task = None,
    revision: Annotated[str | None, typer.Option(rich_help_panel=options.MODEL)] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=options.MODEL)
    ] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="4bit or 8bit (bitsandbytes).", rich_help_panel=options.MODEL)
    ] = None,
    seed_of_head: Annotated[
        int, typer.Option(help="Of a new classification head.", rich_help_panel=options.MODEL)
    ] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="Default: the first accelerator.", rich_help_panel=options.MODEL),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Configuration of a Hub dataset.", rich_help_panel=options.DATA),
    ] = None,
    split: Annotated[str, typer.Option(rich_help_panel=options.DATA)] = "train",
    streaming: Annotated[
        bool,
        typer.Option(help="Read a Hub dataset without downloading.", rich_help_panel=options.DATA),
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(help="Column, or template with {columns}.", rich_help_panel=options.DATA),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The same; without loss.", rich_help_panel=options.DATA)
    ] = None,
    completion: Annotated[
        str | None, typer.Option(help="The same; with loss.", rich_help_panel=options.DATA)
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(help="Column of chats, for the chat template.", rich_help_panel=options.DATA),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Column of classes, which are sorted.", rich_help_panel=options.DATA),
    ] = None,
    label_kind: Annotated[
        str | None,
        typer.Option(help="class, or number for regression.", rich_help_panel=options.DATA),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="File with a template.", rich_help_panel=options.DATA)
    ] = None,
    assistant_only_loss: Annotated[bool, typer.Option(rich_help_panel=options.DATA)] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a sequence. Default: 1,024, or what the model takes.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    packing: Annotated[
        bool, typer.Option(help="Fill the sequences.", rich_help_panel=options.DATA)
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Budget. Default: 65,536.")] = None,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Budget.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Does not change the result.")] = 8,
    estimator: Annotated[
        str, typer.Option(help="sketch, or dense for exact statistics of small models.")
    ] = "sketch",
    seed: Annotated[int, typer.Option(help="Of the sketches.")] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Say what it would cost, and stop. Needs no weights, and without DATA takes "
            "sequences of --max-length tokens."
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="That share the data, for --dry-run. Default: those launched."),
    ] = None,
    save_every: Annotated[
        float,
        typer.Option(min=0, help="Seconds between two saves of the unfinished sums; see --resume."),
    ] = 60.0,
    resume: Annotated[bool, typer.Option(help="Continue after a kill, to the same result.")] = True,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what a method needs, and keep it in a folder.

    The folder is what `calibration=` of a config takes: `LoraGAConfig(…, calibration="FOLDER")`.
    Under `accelerate launch -m peft_gradinit_cli calibrate …` every process reads its share.

    Try it without a network:

        peft-gradinit calibrate embedded:pico-llama embedded:docstrings out/calibration --max-tokens 4096

    What it would cost, from the config of a model alone:

        peft-gradinit calibrate configs/shapes/llama-3-70b --dry-run --processes 8
    """
    from ..work.calibrate import run

    run(
        model={
            "name": model,
            "task": task,
            "revision": revision,
            "dtype": dtype,
            "quantization": quantization,
            "seed": seed_of_head,
        },
        data={
            "path": data,
            "name": name,
            "split": split,
            "streaming": streaming,
            "text": text,
            "prompt": prompt,
            "completion": completion,
            "messages": messages,
            "label": label,
            "label_kind": label_kind,
            "chat_template": chat_template,
            "assistant_only_loss": assistant_only_loss,
            "max_length": max_length,
            "packing": packing,
        },
        method={"name": method, "r": r, "target_modules": target_modules, "options": option or []},
        calibration={
            "max_tokens": max_tokens,
            "max_batches": max_batches,
            "batch_size": batch_size,
            "estimator": estimator,
            "seed": seed,
        },
        place={
            "folder": output,
            "overwrite": overwrite,
            "resume": resume,
            "save_every": save_every,
        },
        device=device,
        processes=processes,
        dry_run=dry_run,
        as_json=as_json,
    )
