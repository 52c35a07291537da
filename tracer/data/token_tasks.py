"""Tasks of models that label tokens: language modeling of all kinds, token classification, question answering."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer._core.validation import check_choice
from tracer.data.model_inputs import (
    as_mapping,
    attended_labels,
    bind_inputs,
    check_label_range,
    check_logits,
    is_transformed,
    logits_of,
    split_mapping,
    upcast_half,
)
from tracer.data.sampled_labels import LabelDraws
from tracer.data.tasks import Task, loss_outputs
from tracer.errors import BatchError
from tracer.types import Batch, SampleOutputs

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_IN_PLACE = ("ForMaskedLM", "ForTokenClassification", "ForPreTraining", "WithLMHeadModel", "XLNetLMHeadModel")
_SHIFTS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # of models whose own loss showed it


def _configs(model: Any) -> Iterator[tuple[Any, list[str]]]:
    """Yield the transformers configurations in a model, each with the names of its module's classes."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        config = getattr(module, "config", None)
        if config is not None:
            yield (
                config,
                [cls.__name__ for cls in type(module).__mro__] + list(getattr(config, "architectures", None) or ()),
            )


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model is an encoder-decoder, as its configuration says."""
    config, _ = next(_configs(model), (None, None))
    return bool(getattr(config, "is_encoder_decoder", False))


def _has_own_loss(model: Any) -> bool:
    """Return whether a model is one of transformers that returns its loss beside the logits if it gets labels."""
    config, _ = next(_configs(model), (None, None))
    has_names = getattr(config, "return_dict", False) is True
    return has_names and "labels" in inspect.signature(model.forward).parameters


def shifts_labels(model: Any) -> bool:
    """Return whether the logits at a position predict the label of the next: by the model's own loss, or its names."""
    if model in _SHIFTS:
        return _SHIFTS[model]
    if is_encoder_decoder(model):
        return False
    for _, names in _configs(model):
        for name in names:
            if any(part in name for part in _IN_PLACE):
                return False
            if any(part in name for part in _CAUSAL):
                return True
    return True


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each label, ``[B, T]``; 0 for -100."""
    # Classes last: cross_entropy over another dimension copies the logits, and takes seven times as long on a CPU.
    rows, wanted = logits.flatten(0, 1), labels.long().flatten()
    return F.cross_entropy(rows, wanted, reduction="none", ignore_index=-100).view(labels.shape)


def _shifted(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Return logits, and labels at the position of the logits that predict them; logits are not copied."""
    return logits, F.pad(labels[:, 1:], (0, 1), value=-100) if shift else labels


class TokenTask(Task):
    """Cross-entropy of labels of tokens, the mean over the labelled tokens of each example; ``f = L``.

    A mapping has the inputs of the model and ``labels [B, T]`` (-100: not predicted), which belong to the logits of
    their own position, as in Hugging Face's encoder-decoders, masked language models and token classifiers; an
    encoder-decoder makes its inputs of them unless ``decoder_input_ids`` are given. A pair is ``(tokens, labels)``.

    Args:
        name: The task's name.
        reduction: ``"mean"`` or ``"sum"`` over the labelled tokens of an example.
    """

    hidden_labels = "all"

    def __init__(self, name: str, reduction: str = "mean") -> None:
        check_choice("reduction", reduction, ("mean", "sum"))
        self.name, self.reduction = name, reduction

    def settings(self) -> dict[str, Any]:
        """Return the name and the reduction."""
        return {"name": self.name, "reduction": self.reduction}

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return losses of examples; see `Task.outputs`."""
        logits, labels = self._aligned(model, batch)
        count = (labels != -100).to(logits.dtype).sum(1)
        loss = _token_losses(logits, labels).sum(1)
        uniform = torch.full_like(count, math.log(logits.shape[-1]))
        if self.reduction == "mean":
            return loss_outputs(loss / count, uniform)
        return loss_outputs(loss, uniform * count)

    def sampled_outputs(self, model: nn.Module, batch: Batch, draws: LabelDraws) -> SampleOutputs:
        """Return losses of drawn tokens; see `Task.sampled_outputs`."""
        logits, labels = self._aligned(model, batch)
        labelled = labels != -100
        # Numbered by labelled tokens, so that padding changes nothing.
        drawn = draws.classes(logits, labelled.cumsum(1)).masked_fill(~labelled, -100)
        loss = _token_losses(logits, drawn).sum(1)
        # Drawn labels are independent, and so is the noise of their gradients: a mean over n has n times the curvature
        # that the second moment of the mean's gradient says.
        return loss_outputs(loss / labelled.sum(1).sqrt() if self.reduction == "mean" else loss)

    def _aligned(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits ``[B, T, V]`` and the label that each predicts, ``[B, T]``."""
        args, kwargs, labels, in_place = self._split(model, batch)
        output = model(*args, **kwargs)
        logits = upcast_half(logits_of(output))
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise BatchError(
                f"{self.name} expects logits [B, T, vocabulary] for labels [B, T]; the model gave "
                f"{tuple(logits.shape)} for labels {tuple(labels.shape)}."
            )
        check_logits(logits, self.name)
        shift = not in_place and self._shifts(model, output, logits, labels)
        if in_place:
            self._check_pair(args[0], logits, labels)
        logits, labels = _shifted(logits, labels, shift)
        self._check(logits, labels)
        return logits, labels

    def shifts(self, model: nn.Module, batch: Batch) -> bool:
        """Return whether logits at a position predict the label of the next position."""
        return not self._is_pair(batch) and self._expects_shift(model)

    def _expects_shift(self, model: nn.Module) -> bool:
        return False

    def _is_pair(self, batch: Batch) -> bool:
        return isinstance(batch, (tuple, list)) and len(batch) == 2

    def _split(self, model: nn.Module, batch: Batch) -> tuple[tuple, dict, Tensor, bool]:
        """Return inputs, labels, and whether the labels are known to be in place."""
        batch = as_mapping(batch)
        if isinstance(batch, Mapping):
            kwargs, labels = split_mapping(model, batch, self.name)
            own_loss = labels is not None and _has_own_loss(model)
            if labels is None:
                labels = self._own_labels(model, batch)
            if "segment_ids" not in inspect.signature(model.forward).parameters:  # the documents of a block
                kwargs.pop("segment_ids", None)
            args, kwargs = bind_inputs(model, kwargs)
            makes_inputs = is_encoder_decoder(model) and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(
                kwargs
            )
            if own_loss and (makes_inputs or model not in _SHIFTS):
                kwargs = {**kwargs, "labels": labels}
            return args, kwargs, labels, False
        items = batch if isinstance(batch, (tuple, list)) else (batch,)
        if len(items) not in (1, 2) or not all(isinstance(item, Tensor) for item in items) or is_encoder_decoder(model):
            raise BatchError(
                f"{self.name} expects a mapping with the names of the model's inputs and 'labels', or (tokens, "
                f"labels); for a causal language model tokens, (tokens,) or (tokens, next_tokens). Got "
                f"{type(batch).__name__} of {len(items)}."
            )
        labels = items[1] if len(items) == 2 else self._own_labels(model, {"input_ids": items[0]})
        return (items[0],), {}, labels, len(items) == 2

    def _own_labels(self, model: nn.Module, batch: Mapping) -> Tensor:
        """Return all attended tokens as labels, for a model that predicts the next token."""
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        if tokens is None or not self._expects_shift(model):
            raise BatchError(
                f"{self.name} needs 'labels', or for a causal language model 'input_ids'; the batch has "
                f"{sorted(map(str, batch))}, and the model is {type(model).__name__}."
            )
        return tokens if mask is None else attended_labels(tokens, mask)

    def _shifts(self, model: nn.Module, output: Any, logits: Tensor, labels: Tensor) -> bool:
        """Return whether to shift labels; the first time, compare with the model's own loss if it gave one."""
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if model not in _SHIFTS and isinstance(own, Tensor) and own.numel() == 1 and not is_transformed(own):
            tolerance = 1e-2 if own.dtype in (torch.float16, torch.bfloat16) else 2e-5
            fits = []
            for shift in (False, True):
                some, wanted = _shifted(logits.detach(), labels, shift)
                mean = _token_losses(some, wanted).sum() / (wanted != -100).sum()
                if bool((mean - own.detach()).abs() <= tolerance * own.detach().abs()):
                    fits.append(shift)
            if len(fits) < 2:  # both fit if all logits are equal; neither if the loss has further terms
                _SHIFTS[model] = fits[0] if fits else shifts_labels(model)
        expected = self._expects_shift(model)
        if not expected and shifts_labels(model):
            raise BatchError(
                f"{self.name} takes labels at the position of their logits, but {type(model).__name__} shifts them "
                f"inside, as a causal language model; use task='language_modeling'."
            )
        return expected

    def _check_pair(self, tokens: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Raise `BatchError` for a pair whose second tensor is a mask."""
        if tokens.shape != labels.shape or is_transformed(labels) or logits.shape[-1] <= 2:
            return
        if bool(((labels == 0) | (labels == 1)).all()) and not bool(((tokens == 0) | (tokens == 1)).all()):
            raise BatchError(
                f"{self.name} got a pair whose second tensor holds only 0 and 1, which would be its labels; expected "
                f"(tokens, labels). Pass an attention mask in a mapping: {{'input_ids': ..., 'attention_mask': ...}}."
            )

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if is_transformed(labels):
            return
        empty = (labels == -100).all(1).nonzero().flatten()
        if len(empty):
            raise BatchError(
                f"Examples {empty[:5].tolist()} of the batch have no token to predict (one token, or all labels -100), "
                f"so their loss is undefined; leave them out."
            )
        check_label_range(labels[labels != -100], logits.shape[-1], self.name)


class LanguageModeling(TokenTask):
    """Cross-entropy of a language model, the mean over the predicted tokens of each sequence.

    ``f = L``. A mapping has ``input_ids`` and, as from Hugging Face collators, ``labels`` of the same shape (-100: not
    predicted). A causal model's are shifted here, and without labels all its attended tokens are predicted. Labels of
    encoder-decoders, masked language models and token classifiers stay in place: a transformers model's own loss
    decides, or its class. A tensor or ``(tokens,)`` is its own label. A pair ``(tokens, next_tokens)`` is used position
    by position.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the predicted tokens of a sequence.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__("language_modeling", reduction)

    def _expects_shift(self, model: nn.Module) -> bool:
        return shifts_labels(model)

    def _check_pair(self, tokens: Tensor, logits: Tensor, labels: Tensor) -> None:
        super()._check_pair(tokens, logits, labels)
        if tokens.shape != labels.shape or is_transformed(labels):
            return
        same, following = (
            bool(((some == wanted) | (wanted == -100)).all())
            for some, wanted in ((tokens, labels), (tokens[:, 1:], labels[:, :-1]))
        )
        if same and not following:
            raise BatchError(
                "language_modeling got a pair of equal tensors, which would have the model predict its own input; "
                "expected (tokens, next_tokens). Pass (tokens,), or a mapping with 'labels', which are shifted here."
            )


class QuestionAnswering(Task):
    """The mean cross-entropy of the first and last token of an answer, as Hugging Face's models have it; ``f = L``.

    Batches are mappings with ``start_positions`` and ``end_positions``, ``[B]``, beside the model's inputs. Padding is
    among the classes, so pad all batches to one length.
    """

    name, hidden_labels = "question_answering", "all"

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return losses of examples; see `Task.outputs`."""
        return self._mean_loss(model, batch, lambda logits, positions, end: positions)

    def sampled_outputs(self, model: nn.Module, batch: Batch, draws: LabelDraws) -> SampleOutputs:
        """Return losses of drawn ends; see `Task.sampled_outputs`."""

        def drawn(logits: Tensor, positions: Tensor, end: int) -> Tensor:
            return draws.classes(logits, torch.full_like(positions, end))

        outputs = self._mean_loss(model, batch, drawn)
        return loss_outputs(outputs.output * math.sqrt(2))  # the mean of two independent losses

    def _mean_loss(
        self, model: nn.Module, batch: Batch, labels: Callable[[Tensor, Tensor, int], Tensor]
    ) -> SampleOutputs:
        batch, ends = as_mapping(batch), ("start", "end")
        if not isinstance(batch, Mapping) or not {f"{end}_positions" for end in ends} <= set(batch):
            raise BatchError(
                "question_answering expects a mapping with 'start_positions' and 'end_positions' beside the model's "
                f"inputs; got {sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__}."
            )
        inputs = {key: value for key, value in batch.items() if key not in ("start_positions", "end_positions")}
        args, kwargs = bind_inputs(model, inputs)
        output = model(*args, **kwargs)
        losses, length = [], 0
        for number, end in enumerate(ends):
            key, positions = f"{end}_logits", batch[f"{end}_positions"]
            logits = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
            if not isinstance(logits, Tensor) or logits.ndim != 2 or positions.shape != logits.shape[:1]:
                raise BatchError(
                    f"question_answering expects {key} [B, T] from the model and {end}_positions [B]; got "
                    f"{type(output).__name__} with {getattr(logits, 'shape', None)} and {tuple(positions.shape)}."
                )
            logits, length = upcast_half(logits), logits.shape[1]
            if not is_transformed(positions):
                check_label_range(positions, length, self.name)
            losses.append(F.cross_entropy(logits, labels(logits, positions.long(), number), reduction="none"))
        loss = (losses[0] + losses[1]) / 2
        return loss_outputs(loss, torch.full_like(loss.detach(), math.log(length)))
