"""Makes an engine, in the process that it is to live in: loads the model, and says what others must know of it.

Fronts name `build_engine` and never call it; so nothing here loads torch or the model's code before it is called.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from deployments.engine.config import EngineConfig
from deployments.engine_info import EngineInfo
from deployments.grammars import VocabularyError, read_vocabulary
from deployments.kv_transfer.layout import KVLayout

if TYPE_CHECKING:
    from deployments.engine.engine import Engine
    from deployments.engine.model.load import LoadedModel
    from deployments.kv_transfer.local import Arena

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what others must know of it.

    Attributes:
        engine: loaded, idle.
        info: for fronts and the ingress.
        layout: of its KV blocks; None: it takes part in no hand-off.
        device_type: where its KV is.
        arena: where it copies KV to that it hands over; None: to memory that is its process's alone.
    """

    engine: "Engine"
    info: EngineInfo
    layout: KVLayout | None
    device_type: str
    arena: "Arena | None" = None


EngineBuilder: TypeAlias = Callable[[EngineConfig], BuiltEngine]


def build_engine(config: EngineConfig) -> BuiltEngine:
    """Load the model and set up this process for it."""
    from deployments.engine.model.load import load_model
    from deployments.engine.process import configure_process

    configure_process(config.num_threads or 1)  # never all of the node's cores: it has other engines
    return assemble_engine(load_model(config), config)


def assemble_engine(loaded: "LoadedModel", config: EngineConfig) -> BuiltEngine:
    """An engine around a model, and what its process needs to hand KV over."""
    from deployments.engine.engine import Engine
    from deployments.kv_transfer.local import Arena

    _prepare_grammars(loaded)
    engine = Engine(loaded, config)
    limits, shape = engine.limits, engine.kv_shape
    layout = KVLayout(
        model=loaded.fingerprint,
        dtype=shape.form.name,
        block_size=limits.block_size,
        groups=shape.groups,
    )
    info = EngineInfo(
        path=loaded.path,
        max_model_len=limits.max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
        block_size=limits.block_size,
        bytes_per_block=layout.bytes_per_block,
        lease_s=config.lease_s,
        pid=os.getpid(),
        num_blocks=limits.num_blocks,
        positions=loaded.positions,
        kv=layout.name,
        model=config.model,
        kv_windows=limits.kv_windows,
    )
    logger.info("engine ready: %s, %s, pid %d", loaded.path, limits, os.getpid())
    arena = None
    if config.share_kv and config.hands_over:
        arena = Arena(engine.export_room.num_bytes, loaded.device.type)
        engine.export_into(arena.allocate)
    return BuiltEngine(engine, info, layout, loaded.device.type, arena)


def _prepare_grammars(loaded: "LoadedModel") -> None:
    """Read the vocabulary now: the first answer with a grammar would stop all others for as long as that takes."""
    if not loaded.eos_token_ids:
        return  # no grammar goes without them
    try:
        read_vocabulary(loaded.path, loaded.vocab_size, tuple(sorted(loaded.eos_token_ids)))
    except VocabularyError as error:
        logger.info("answers of this model follow no grammars: %s", error)
