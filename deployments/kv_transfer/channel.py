"""What the two ends of a link share once it stands."""

from dataclasses import dataclass

from deployments.kv_transfer.group import Group
from deployments.kv_transfer.line import Line


@dataclass(frozen=True, slots=True, eq=False)
class Channel:
    """One end of it.

    Attributes:
        group: moves chunks; None: the receiver reads them where they are.
        line: carries the receiver's questions for them, and the source's answers.
    """

    group: Group | None
    line: Line

    def abort(self) -> None:
        """End both from any thread; what waits for them, on either end, ends too."""
        self.line.close()
        if self.group is not None:
            self.group.abort()
