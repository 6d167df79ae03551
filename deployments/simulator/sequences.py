"""What a modelled engine has: prompts that it computes, and answers that it draws. Knows no time."""

from collections.abc import Callable
from dataclasses import dataclass

from deployments.simulator.requests import Request


@dataclass(eq=False, slots=True)
class Prompt:
    """A prompt that is computed here.

    Attributes:
        request: whose.
        left: tokens to compute; counted once its turn comes, when the cache is looked into.
        done: told when it is computed.
        since_s: when it came to this engine.
        number: in the order in which they came.
        num_overtaken: tokens of later prompts that went before it.
    """

    request: Request
    done: Callable[[], None]
    since_s: float
    number: int
    left: int = -1
    num_overtaken: int = 0

    @property
    def precedence(self) -> tuple[bool, int, int]:
        """Fewest tokens first, but none may be overtaken by more than it has; see `engine/scheduling/scheduler.py`."""
        whole = self.request.prompt_tokens
        if self.num_overtaken >= whole:
            return False, self.number, 0
        return True, whole if self.left < 0 else self.left, self.number


@dataclass(eq=False, slots=True)
class Answer:
    """An answer that is drawn here, from its second token.

    Attributes:
        request: whose.
        done: told when its last token is drawn.
        sent_back: told that it gave way to others, and how many tokens of it were drawn.
        since_s: when its last token came, before it draws here.
        since_step: it draws from then on.
        over: late gaps of this engine until then.
    """

    request: Request
    done: Callable[[], None]
    sent_back: Callable[[int], None]
    since_s: float
    since_step: float = 0.0
    over: float = 0.0


def precedence_of(prompt: Prompt) -> tuple[bool, int, int]:
    """For sorting."""
    return prompt.precedence
