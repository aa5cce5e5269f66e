"""Which tokens of a batch count: not padding, and, if wanted, only those that carry loss.

In a causal model the token at `t` predicts the label at `t + 1`, so it carries loss if *that* label
is kept; elsewhere labels stand at their own tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .tokens import IGNORE_INDEX, is_encoder_decoder, n_sequences, shifts_labels


class TokenSelection:
    """The tokens of one batch that count.

    `n_tokens` is how many of the labels' tokens count; of sequences, if the batch has no tokens.
    """

    def __init__(self, model: nn.Module, batch: Any, *, use_labels: bool) -> None:
        masks = _masks(model, batch, use_labels) if isinstance(batch, Mapping) else []
        # One wait for the device for each part, which gives the number as well.
        found = [mask.flatten().nonzero().squeeze(1) for mask in masks]
        self._parts: list[tuple[tuple[int, ...], Tensor | None]] = [
            (tuple(mask.shape), None if len(rows) == mask.numel() else rows)
            for mask, rows in zip(masks, found, strict=True)
        ]
        self.n_tokens = len(found[-1]) if found else n_sequences(batch)

    def rows(
        self, x: Tensor, of_encoder: Callable[[Tensor], bool | None] = lambda x: None
    ) -> Tensor:
        """Select the inputs that count from `(*batch, in)`; `x` itself if there is nothing to drop.

        Tokens are also selected from flattened batches: `(tokens, in)` with as many rows as the
        batch has tokens. Inputs of any other shape (routed to an expert, pooled, of an image) do
        not belong to this sequence, and all of them count.

        Args:
            x: the inputs.
            of_encoder: whether inputs are of the encoder's tokens; asked if it and the decoder have
                equally many. Where that is not known (`None`), what either keeps is kept.
        """
        shape = tuple(x.shape[:-1])
        parts = [index for s, index in self._parts if shape in (s, (s[0] * s[1],))]
        if len(parts) > 1 and (side := of_encoder(x)) is not None:
            parts = parts[:1] if side else parts[1:]
        kept = [index for index in parts if index is not None]
        if not parts or len(kept) < len(parts):
            return x
        index = kept[0] if len(kept) == 1 else torch.cat(kept).unique()
        return x.reshape(-1, x.shape[-1])[index.to(x.device)]


def _masks(model: nn.Module, batch: Mapping[str, Any], use_labels: bool) -> list[Tensor]:
    """Masks `(sequences, tokens)`: of the encoder if there is one, then of the part with labels."""
    labels = batch.get("labels") if use_labels else None
    if not is_encoder_decoder(model):
        mask = _unpadded(batch, "attention_mask", "input_ids")
        return [] if mask is None else [_with_loss(model, mask, labels)]
    encoder = _unpadded(batch, "attention_mask", "input_ids")
    decoder = _unpadded(batch, "decoder_attention_mask", "decoder_input_ids", "labels")
    if decoder is not None:
        if batch.get("decoder_attention_mask") is None:
            decoder = _up_to_last_label(decoder, batch.get("labels"))
        decoder = _with_loss(model, decoder, labels)
    return [mask for mask in (encoder, decoder) if mask is not None]


def _unpadded(batch: Mapping[str, Any], mask_name: str, *token_names: str) -> Tensor | None:
    mask, ids = batch.get(mask_name), batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 3:
        # Several choices a row, which the model takes for rows.
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            mask = torch.ones_like(ids)
        return mask.flatten(0, 1) != 0
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    tokens = (batch.get(name) for name in (*token_names, "inputs_embeds"))
    found = next((t for t in tokens if isinstance(t, Tensor) and t.dim() >= 2), None)
    if found is None:
        return None
    return torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)


def _up_to_last_label(mask: Tensor, labels: Any) -> Tensor:
    """Drop what is behind the last label of a row: the decoder's input there is made of padding."""
    if not _are_of_tokens(labels, mask):
        return mask
    n_left = (labels != IGNORE_INDEX).flip(1).cumsum(1).flip(1)
    return mask & (n_left > 0)


def _are_of_tokens(labels: Any, mask: Tensor) -> TypeGuard[Tensor]:
    return (
        isinstance(labels, Tensor) and not labels.is_floating_point() and labels.shape == mask.shape
    )


def _with_loss(model: nn.Module, mask: Tensor, labels: Any) -> Tensor:
    """Drop tokens without loss; labels that are classes, targets or of other tokens drop none."""
    if not _are_of_tokens(labels, mask):
        return mask
    carries = labels != IGNORE_INDEX
    if shifts_labels(model):
        carries = torch.cat([carries[:, 1:], torch.zeros_like(carries[:, :1])], dim=1)
    return mask & carries
