"""Reads a GGUF file, with bounds: metadata, and where its tensors are. The package `gguf` believes whatever is written.

One wrong byte has it read for minutes beyond the end of a file, or take a tensor from where another one lies. Knows no
models. Called by `gguf.py`.

Source of the layout: the GGUF specification (ggml, docs/gguf.md), and llama.cpp's own reader, which has tensors lie one
after the other in the order of their descriptions.
"""

from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderField

# Ten times the largest known: vocabularies and merges, templates, experts that are tensors of their own.
_MAX_ELEMENTS = 2**23
_MAX_STRING = 2**26
_MAX_TENSORS = 2**19
_MAX_DIMENSIONS = 4  # of the format


class BoundedReader(GGUFReader):
    """What `GGUFReader` reads, if it makes sense.

    Raises:
        ValueError: it does not; says what, and the bound.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, and should have {end} at least")
        return super()._get(offset, dtype, count, override_order)

    def _get_str(self, offset: int) -> Any:
        if (length := int(self._get(offset, np.uint64)[0])) > _MAX_STRING:
            raise ValueError(f"a text of {length} bytes at byte {offset}; {_MAX_STRING} are allowed")
        return super()._get_str(offset)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY and (count := int(self._get(orig_offs + 4, np.uint64)[0])) > _MAX_ELEMENTS:
            raise ValueError(f"a list of {count} elements at byte {orig_offs}; {_MAX_ELEMENTS} are allowed")
        return super()._get_field_parts(orig_offs, raw_type)

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        _, name = self._get_str(orig_offs)
        num_dimensions = int(self._get(orig_offs + 8 + len(name), np.uint32)[0])
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {bytes(name)!r} has {num_dimensions} dimensions; {_MAX_DIMENSIONS} are allowed")
        return super()._get_tensor_info_field(orig_offs)

    def _build_tensor_info(self, offs: int, count: int) -> Any:
        if count > _MAX_TENSORS:
            raise ValueError(f"{count} tensors; {_MAX_TENSORS} are allowed")
        return super()._build_tensor_info(offs, count)

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        super()._build_tensors(start_offs, fields)
        expected = start_offs
        for tensor in self.tensors:
            if tensor.data_offset != expected:
                raise ValueError(f"tensor {tensor.name} at byte {tensor.data_offset}; by those before it at {expected}")
            expected += -(-int(tensor.n_bytes) // self.alignment) * int(self.alignment)
