"""What the two ends of a link share once it stands."""

from dataclasses import dataclass

from deployments.kv_transfer.group import Group
from deployments.kv_transfer.line import Line


@dataclass(frozen=True, slots=True, eq=False)
class Channel:
    """One end of it.

    Attributes:
        group: moves chunks.
        line: carries the receiver's questions for them, and the source's answers.
    """

    group: Group
    line: Line

    def abort(self) -> None:
        """End both from any thread; what waits for them, on either end, ends too."""
        self.line.close()
        self.group.abort()
