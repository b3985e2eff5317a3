"""The training loss, with logits made in parts: of the vocabulary, or, with a teacher, of the tokens."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from saap.models.families import family_of
from saap.models.logits import cross_entropy

LOGITS_AT_ONCE = 2**22  # float32 numbers: 16 MB; above 32 MB a C library asks the system for memory each time


class Student(nn.Module):
    """A causal model as the trainer sees it: from a batch to the loss over the tokens that have a label.

    teacher: a frozen model of the same tokenizer; the loss is then (1 − share)·CE + share·KL(teacher ‖ model).
    Logits are made for labelled tokens only.
    """

    def __init__(self, model: Any, teacher: Any = None, share: float = 0.0) -> None:
        super().__init__()
        self.model, self.share = model, share
        self.form = family_of(model.config).logits(model.config)
        self._teacher = (teacher,)  # not a submodule: neither trained, nor wrapped, nor saved

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | float | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """The summed loss over `num_items_in_batch`, the labels of all batches of the step (those of this one if None).

        A label is predicted from the tokens before it, so the first of a row must be −100.
        """
        model: Any = self.model  # a causal model of transformers
        targets = labels[:, 1:]
        chosen = targets != -100
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        hidden = model.base_model(**batch).last_hidden_state[:, :-1][chosen]
        (teacher,), taught = self._teacher, None
        if teacher is not None and self.training:
            with torch.no_grad():
                theirs = teacher.base_model(**batch).last_hidden_state[:, :-1][chosen]
            taught = theirs, teacher.get_output_embeddings().weight.to(theirs.dtype)
        head = model.get_output_embeddings().weight
        total = _FrozenHeadLoss.apply(hidden, head, targets[chosen], taught, self.share, self.form)
        return {"loss": total / (chosen.sum() if num_items_in_batch is None else num_items_in_batch)}


class _FrozenHeadLoss(torch.autograd.Function):
    """Σ over tokens of (1 − s)·CE + s·KL for logits = hidden·headᵀ, never holding more than a few rows of logits.

    The head does not learn, so the gradient with respect to `hidden` is made on the way: with p the softmax and q the
    teacher's, ∂/∂logits = p − (1 − s)·onehot − s·q. form: (scale, cap) of the logits, as in `Family.logits`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        teacher: tuple[torch.Tensor, torch.Tensor] | None,
        share: float,
        form: tuple[float, float | None],
    ) -> torch.Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        if teacher is None and ctx.needs_input_grad[0]:
            losses, back = cross_entropy(head, None, hidden.to(dtype), targets, *form)
            ctx.gradient = back.to(hidden.dtype)
            return losses.sum()
        weight, rows = head.to(dtype), max(1, LOGITS_AT_ONCE // len(head))
        share = share if teacher is not None else 0.0
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = _formed(F.linear(hidden[part].to(dtype), weight).float(), form)
            slope = _slope(logits, form)
            log_p = logits.log_softmax(-1)
            target = targets[part].unsqueeze(-1)
            total -= (1 - share) * log_p.gather(-1, target).sum()
            q = None
            if teacher is not None:
                log_q = _formed(F.linear(teacher[0][part], teacher[1]).float(), form).log_softmax(-1)
                q = log_q.exp()
                total += share * torch.dot(q.flatten(), log_q.sub_(log_p).flatten())
            if gradient is not None:
                change = log_p.exp_()
                change.scatter_add_(-1, target, torch.full_like(target, share - 1, dtype=change.dtype))
                if q is not None:
                    change.sub_(q, alpha=share)
                if slope is not None:
                    change.mul_(slope)
                gradient[part] = change.to(dtype) @ weight
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        return (None if ctx.gradient is None else ctx.gradient * grad), None, None, None, None, None


def _formed(logits: torch.Tensor, form: tuple[float, float | None]) -> torch.Tensor:
    scale, cap = form
    if scale != 1:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


def _slope(logits: torch.Tensor, form: tuple[float, float | None]) -> torch.Tensor | None:
    """Of the formed logits with respect to the plain ones: scale·(1 − (logits / cap)²), or None for 1."""
    scale, cap = form
    if cap:
        return scale * (1 - (logits / cap).square())
    return None if scale == 1 else logits.new_full((), scale)
