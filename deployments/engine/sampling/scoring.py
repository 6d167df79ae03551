"""How likely tokens were: those that a step draws, and those of prompts, with the likeliest ones beside them.

Logprobs are those of the model's own distribution: before adjustments, temperature, and the bounds of sampling. Steps
of which nobody asked for any never come here.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.upload import upload
from deployments.messages import DrawnToken, Draws

# Logits are turned into float32 so many rows at a time.
_PIECE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Scoring:
    """What one step scores: S draws, of which some are wanted, then P tokens of prompts.

    Attributes:
        rows: (P,) places in the batch of the tokens before those of prompts.
        tokens: (P,) int64 those of prompts.
        num_tops: (S + P,) how many of the likeliest tokens are told beside each; -1: it is not told at all.
    """

    rows: np.ndarray
    tokens: np.ndarray
    num_tops: np.ndarray

    def score(self, logits: Tensor, drawn: Tensor) -> "Scores":
        """Start computing the scores; on a GPU nothing waits.

        Args:
            logits: at least (S + P, vocab_size), the model's, or (S, vocab_size) where P is 0.
            drawn: (S,) int64.
        """
        tokens = torch.cat((drawn, upload(self.tokens, drawn.device))) if len(self.tokens) else drawn
        logits, num_top = logits[: len(tokens)], max(0, int(self.num_tops.max()))
        pieces = [
            _score(rows, own, num_top)
            for rows, own in zip(logits.split(_PIECE_ROWS), tokens.split(_PIECE_ROWS), strict=True)
        ]
        own, ranks, top_tokens, top = (_to_host(torch.cat(parts)) for parts in zip(*pieces, strict=True))
        return Scores(self, own, ranks, top_tokens, top)


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one step; on the host once it has ended.

    Attributes:
        scoring: what they are of.
        own: (S + P,) float32 logprobs of the tokens.
        ranks: (S + P,) int64.
        top_tokens: (S + P, K) int64, likeliest first.
        top: (S + P, K) float32 their logprobs.
    """

    scoring: Scoring
    own: Tensor
    ranks: Tensor
    top_tokens: Tensor
    top: Tensor

    def of_draws(self, tokens: list[int]) -> list[DrawnToken]:
        """What was drawn, in order."""
        return self._tell(tokens, 0)

    def of_prompts(self, items: list[ScheduledSequence]) -> list[tuple[ScheduledSequence, Draws]]:
        """Runs that score tokens of their prompts, each with those."""
        num_draws = len(self.own) - len(self.scoring.tokens)
        told = iter(self._tell(self.scoring.tokens.tolist(), num_draws))
        return [(item, tuple(islice(told, item.num_scored))) for item in items if item.num_scored]

    def _tell(self, tokens: list[int], start: int) -> list[DrawnToken]:
        """Of consecutive rows."""
        rows = slice(start, start + len(tokens))
        own, ranks, top_tokens, top = (
            part[rows].tolist() for part in (self.own, self.ranks, self.top_tokens, self.top)
        )
        found = []
        for row, num_top in enumerate(self.scoring.num_tops[rows].tolist()):
            if num_top < 0:
                found.append(DrawnToken(tokens[row]))
                continue
            likeliest = tuple(zip(top_tokens[row][:num_top], top[row][:num_top], strict=True))
            found.append(DrawnToken(tokens[row], own[row], ranks[row], likeliest))
        return found


def build_scoring(items: list[ScheduledSequence]) -> Scoring:
    """What a step scores of these, in the batch's order."""
    of_draws: list[int] = []
    of_prompts: list[int] = []
    rows: list[np.ndarray] = [np.empty(0, np.int64)]
    tokens: list[np.ndarray] = [np.empty(0, np.int64)]
    place = 0
    for item in items:
        request, num_scored = item.sequence.request, item.num_scored
        num_top = request.sampling.num_logprobs
        of_draws += [-1 if num_top is None else num_top] * item.num_draws
        if num_scored:
            assert request.num_prompt_logprobs is not None
            of_prompts += [request.num_prompt_logprobs] * num_scored
            rows.append(np.arange(place, place + num_scored))
            scored = item.sequence.token_ids[item.start + 1 : item.start + 1 + num_scored]
            tokens.append(np.frombuffer(scored, np.uint32).astype(np.int64))
        place += item.num_tokens
    return Scoring(np.concatenate(rows), np.concatenate(tokens), np.array(of_draws + of_prompts))


def _score(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs, ranks, likeliest tokens and their logprobs, of each row's distribution."""
    logits = logits.float()
    own, total = logits.gather(1, tokens.unsqueeze(1)), logits.logsumexp(dim=1, keepdim=True)
    top, top_tokens = logits.topk(num_top, dim=1)
    ranks = (logits > own).sum(dim=1) + 1
    return (own - total).squeeze(1), ranks, top_tokens, top - total


def _to_host(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
