"""What all clients ask for: forms so bounded that the smallest model fills them, and soon."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

Word = Annotated[str, Field(pattern=r"^[A-Z][a-z]{2,9}$")]
TEXT = "Paris is a large town in France."
# More than the longest answer that their grammars allow, white space between all words included.
MAX_TOKENS = 1000
# Of what is drawn: without it an answer is another one each time, and one in many is cut off.
SEED = 1
# For one answer, on a machine that others keep busy, too.
TIMEOUT_S = 600


class Town(BaseModel):
    """A town."""

    name: Word
    country: Word
    size: Literal["small", "large"]
