"""The files that a request enters are those that docs/request-path.md names: one streamed chat through real pools."""

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest

from deployments.api.http import build_app
from tests.api import fakes
from tests.api.fakes import CHAT, body_of, build_codec, client_of
from tests.call_lines import kept_lines, logging_observer
from tests.deployments.conftest import StartPools
from tests.engine.families import VOCAB_SIZE
from tests.waiting import until

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = ROOT / "deployments"
PAGE = (ROOT / "docs" / "request-path.md").read_text()
INFO = replace(fakes.INFO, max_model_len=512, vocab_size=VOCAB_SIZE, eos_token_ids=())
# It stands in for an engine in an actor, behind Ray's handle and transport, which the page has.
IN_THE_PLACE_OF_RAY = {"local_engine.py"}


class Profile:
    """Code that was entered in any thread that was started since, `clear` called last."""

    def __init__(self) -> None:
        self._entered: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self._entered.add(frame.f_code.co_filename)

    def clear(self) -> None:
        self._entered.clear()

    def files(self) -> set[str]:
        """Those of the project, as the page names them."""
        paths = [Path(name) for name in self._entered.copy()]
        return {str(path.relative_to(DEPLOYMENTS)) for path in paths if path.is_relative_to(DEPLOYMENTS)}


@pytest.fixture
def profile() -> Iterator[Profile]:
    profile, before = Profile(), sys.getprofile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    yield profile
    sys.setprofile(before)
    threading.setprofile(before)


async def test_the_page_names_every_file_that_a_streamed_chat_enters(profile: Profile, start: StartPools) -> None:
    pools = await start()
    app = build_app(pools.backend, build_codec(), INFO, observer=logging_observer())
    with kept_lines() as lines:
        async with client_of(app) as client:
            profile.clear()
            body = body_of(CHAT, messages=[{"role": "user", "content": "abc " * 30}], max_tokens=4, stream=True)
            answer = await client.post(CHAT, json=body)
        await until(lambda: lines)  # with which the call is over
        entered = profile.files()
    assert answer.text.endswith("data: [DONE]\n\n")
    await until(lambda: pools.prefill.front.handoff.num_requests == 1)
    assert {"decode.py", "prefill.py", "engine/kv/cache.py", "tokens/wire.py"} <= entered, "every thread is watched"
    named = {path.removeprefix("deployments/") for path in PAGE.replace("`", " ").split() if path.endswith(".py")}
    assert sorted(entered - named - IN_THE_PLACE_OF_RAY) == []
