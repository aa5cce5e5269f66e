"""What is measured on what: the options that `calibrate` and `start` share."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .options import ADAPTER, DATA, MODEL, Task


@dataclasses.dataclass(frozen=True)
class Measured:
    """The options of a pass over data, each with its help."""

    r: Annotated[int, typer.Option("--r", min=1, rich_help_panel=ADAPTER)] = 8
    target_modules: Annotated[
        str,
        typer.Option(
            help="As in LoraConfig; several names are separated by commas.",
            rich_help_panel=ADAPTER,
        ),
    ] = "all-linear"
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Further field of the method's config, KEY=VALUE; can be repeated.",
            rich_help_panel=ADAPTER,
        ),
    ] = None
    task: Task = None
    revision: Annotated[str | None, typer.Option(rich_help_panel=MODEL)] = None
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)
    ] = "auto"
    quantization: Annotated[
        str | None, typer.Option(help="4bit or 8bit (bitsandbytes).", rich_help_panel=MODEL)
    ] = None
    seed_of_head: Annotated[
        int, typer.Option(help="Seed of a new classification head.", rich_help_panel=MODEL)
    ] = 0
    device: Annotated[
        str | None,
        typer.Option(help="Default: the first accelerator.", rich_help_panel=MODEL),
    ] = None
    name: Annotated[
        str | None, typer.Option(help="Configuration of a Hub dataset.", rich_help_panel=DATA)
    ] = None
    split: Annotated[str, typer.Option(rich_help_panel=DATA)] = "train"
    streaming: Annotated[
        bool, typer.Option(help="Read a Hub dataset without downloading.", rich_help_panel=DATA)
    ] = False
    text: Annotated[
        str | None, typer.Option(help="Column, or template with {columns}.", rich_help_panel=DATA)
    ] = None
    prompt: Annotated[
        str | None, typer.Option(help="The same, for the part without loss.", rich_help_panel=DATA)
    ] = None
    completion: Annotated[
        str | None, typer.Option(help="The same, for the part with loss.", rich_help_panel=DATA)
    ] = None
    messages: Annotated[
        str | None,
        typer.Option(help="Column of chats, for the chat template.", rich_help_panel=DATA),
    ] = None
    label: Annotated[
        str | None,
        typer.Option(help="Column of classes, which are sorted.", rich_help_panel=DATA),
    ] = None
    label_kind: Annotated[
        str | None, typer.Option(help="class, or number for regression.", rich_help_panel=DATA)
    ] = None
    chat_template: Annotated[
        str | None, typer.Option(help="File with a template.", rich_help_panel=DATA)
    ] = None
    assistant_only_loss: Annotated[bool, typer.Option(rich_help_panel=DATA)] = False
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a sequence. Default: 1,024, or what the model takes.",
            rich_help_panel=DATA,
        ),
    ] = None
    packing: Annotated[bool, typer.Option(help="Fill the sequences.", rich_help_panel=DATA)] = False
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens read. Default: 65,536.")
    ] = None
    max_batches: Annotated[int | None, typer.Option(min=1, help="Most batches read.")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Does not change the result.")] = 8
    estimator: Annotated[
        str, typer.Option(help="sketch, or dense for exact statistics of small models.")
    ] = "sketch"
    seed: Annotated[int, typer.Option(help="Seed of the sketches.")] = 0

    def sections(self, model: str, data: str | None, method: str) -> dict[str, dict[str, Any]]:
        """Fields of the sections of a recipe, by section.

        Args:
            model: name of the model.
            data: path of the data.
            method: name of the method.

        Returns:
            The fields, with targets and options as the command line has them.
        """
        of_model = ("task", "revision", "dtype", "quantization")
        of_data = (
            *("name", "split", "streaming", "text", "prompt", "completion", "messages", "label"),
            *("label_kind", "chat_template", "assistant_only_loss", "max_length", "packing"),
        )
        of_pass = ("max_tokens", "max_batches", "batch_size", "estimator", "seed")
        return {
            "model": {"name": model, **self._only(of_model), "seed": self.seed_of_head},
            "data": {"path": data, **self._only(of_data)},
            "method": {
                "name": method,
                **self._only(("r", "target_modules")),
                "options": self.option or [],
            },
            "calibration": self._only(of_pass),
        }

    def _only(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


def takes_measured(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Measured` in place of its parameter `measured`.

    Args:
        command: whose parameter it is.

    Returns:
        The command as Typer reads it: one parameter an option.
    """
    shared = inspect.signature(Measured).parameters
    parameters = dict(inspect.signature(command).parameters)
    del parameters["measured"]
    flat = [*parameters.values(), *shared.values()]

    @functools.wraps(command)
    def flattened(**values: Any) -> None:
        measured = Measured(**{name: values.pop(name) for name in shared})
        command(measured=measured, **values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    flattened.__dict__["__signature__"] = inspect.Signature([p.replace(kind=keyword) for p in flat])
    flattened.__annotations__ = {p.name: p.annotation for p in flat}
    return flattened
