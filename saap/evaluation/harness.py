"""lm-eval's Hugging Face model with the answers to one question sharing its forward pass."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import nn

from saap.errors import not_finite
from saap.evaluation.log_probs import log_probs
from saap.models.families import family_of
from saap.models.products import FastLinears
from saap.progress import tqdm


@dataclass
class Question:
    """A context of tokens with its answers: (number of the request, tokens)."""

    context: tuple[int, ...]
    answers: list[tuple[int, list[int]]] = field(default_factory=list)

    def __len__(self) -> int:
        """Tokens to run: all but the last one of an answer, which predicts nothing that is asked for."""
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.answers)


class SharedQuestionLM(HFLM):
    """Log-likelihoods as the stock model gives them, from a third of the tokens for items of four answers.

    The stock model runs every (question, answer) pair as a sequence of its own. Here a question is one sequence
    [question, answer 1, answer 2, …] in which mask and positions let an answer see the question and itself; logits
    are made only where an answer is predicted. Questions are sorted by length and batched by `batch_tokens`, which
    is halved when the device runs out of memory. Models with ALiBi positions, linear attention or
    a window shorter than `max_length` go the stock way.
    Log-softmax is in float32 whatever the model's dtype (the stock model's `softmax_dtype=float32`).
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_tokens: int) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=max(1, batch_tokens // 128),
            device=str(next(model.parameters()).device),
            softmax_dtype="float32",
        )
        self._batch_tokens = batch_tokens
        window = getattr(self.config, "sliding_window", None)
        self._share = family_of(self.config).rotary and (window is None or window >= self.max_length)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in lm-eval, without its bars, which would stay on the screen."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not self._share:
            shown = not os.environ.get("TQDM_DISABLE")
            scores = super()._loglikelihood_tokens(requests, disable_tqdm=not shown, override_bs=override_bs)
            if any(math.isnan(value) for value, _ in scores):  # elsewhere log_probs sees to it
                raise not_finite("a log-probability", self.model)
            return scores
        questions = sorted(self._questions(requests), key=len, reverse=True)
        results: dict[int, tuple[float, bool]] = {}
        budget, start = self._batch_tokens, 0
        with tqdm(total=len(requests), desc="answers", unit="answer") as bar:
            while start < len(questions):
                rows = max(1, budget // len(questions[start]))
                try:
                    found = self._score(questions[start : start + rows])
                except torch.OutOfMemoryError:
                    if rows == 1:
                        raise
                    budget //= 2
                    torch.cuda.empty_cache()
                    continue
                results |= found
                start += rows
                bar.update(len(found))
        return [results[number] for number in range(len(requests))]

    def _questions(self, requests: Sequence[Any]) -> list[Question]:
        questions: dict[tuple[int, ...], Question] = {}
        for number, (_, context, answer) in enumerate(requests):
            # what does not fit is cut from the left, as the stock model does
            context = tuple(context[max(0, len(context) + len(answer) - self.max_length - 1) :])
            questions.setdefault(context, Question(context)).answers.append((number, answer))
        return list(questions.values())

    @torch.inference_mode()
    def _score(self, batch: list[Question]) -> dict[int, tuple[float, bool]]:
        """Request → (sum of the answer's log-probabilities, whether greedy decoding would give it)."""
        length = max(map(len, batch))
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        positions = torch.zeros_like(ids)
        owner = torch.full_like(ids, -1)  # 0: the question, 1…: its answers, −1: padding
        places: list[tuple[int, int, list[int], list[int]]] = []  # request, row, columns that predict, tokens
        for row, question in enumerate(batch):
            end = len(question.context)
            ids[row, :end] = torch.tensor(question.context)
            positions[row, :end] = torch.arange(end)
            owner[row, :end] = 0
            for number, (request, tokens) in enumerate(question.answers, 1):
                begin, end = end, end + len(tokens) - 1
                ids[row, begin:end] = torch.tensor(tokens[:-1], dtype=torch.long)
                positions[row, begin:end] = len(question.context) + torch.arange(end - begin)
                owner[row, begin:end] = number
                places.append((request, row, [len(question.context) - 1, *range(begin, end)], tokens))
        seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(len(batch), 1, length, length, dtype=self.model.dtype)
        mask.masked_fill_(~seen[:, None], torch.finfo(mask.dtype).min)

        with FastLinears():
            hidden = self.model.base_model(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=positions.to(self.device),
                use_cache=False,
            ).last_hidden_state
        # an answer's first token is predicted where those of the question's other answers are
        asked = torch.tensor([row * length + column for _, row, columns, _ in places for column in columns])
        unique, rows = asked.unique(return_inverse=True)
        targets = torch.tensor([t for *_, tokens in places for t in tokens])
        found, likeliest = log_probs(self.model, hidden.flatten(0, 1)[unique.to(hidden.device)], rows, targets)
        counts = [len(tokens) for *_, tokens in places]
        return {
            request: (float(its.sum()), bool(hits.all()))
            for (request, *_), its, hits in zip(
                places, found.cpu().split(counts), likeliest.cpu().split(counts), strict=True
            )
        }
