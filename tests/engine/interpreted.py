"""Triton's kernels where there is no GPU: its interpreter runs them, program by program (see `tests/conftest.py`)."""

from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
triton = pytest.importorskip("triton")
if DEVICE.type == "cpu" and not triton.__version__.startswith("3.6."):
    pytest.skip(f"Triton {triton.__version__} has another interpreter than 3.6", allow_module_level=True)

from triton import language  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_patch_lang, _patch_lang_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor


def _patch_index_too(tensor: type, scope: Any) -> None:
    """Triton 3.6 turns arrays of one number into an int, which numpy 2.4 refuses to do."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_index_too


def _patch_once(function: Any) -> Any:
    """A function that a kernel calls finds the language patched; to patch it for each call is half of the time."""
    used = [value for value in function.__globals__.values() if value is language or value is language.core]
    if any(language.core.is_builtin(of.load) for of in used):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _patch_once
