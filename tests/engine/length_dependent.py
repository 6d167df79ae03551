"""Families whose rotary embeddings depend on a sequence's length, and one whose do not though they stretch."""

BORDER = 32
_HALF = 8  # of a head
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(_HALF)],
    "long_factor": [2.0 + i for i in range(_HALF)],
}
LENGTH_DEPENDENT: dict[str, tuple[str, dict[str, object]]] = {
    "phi3_longrope": (
        "Phi3Config",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": BORDER,
            "sliding_window": None,
            "rope_parameters": _LONGROPE,
        },
    ),
    "phi4_mini_longrope": (  # a part of each head is rotated
        "Phi3Config",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": BORDER,
            "sliding_window": None,
            "rope_parameters": _LONGROPE
            | {
                "partial_rotary_factor": 0.5,
                "short_factor": _LONGROPE["short_factor"][: _HALF // 2],  # type: ignore[index]
                "long_factor": _LONGROPE["long_factor"][: _HALF // 2],  # type: ignore[index]
            },
        },
    ),
    "llama_longrope": (
        "LlamaConfig",
        {
            "max_position_embeddings": 256,
            "rope_parameters": _LONGROPE | {"original_max_position_embeddings": BORDER, "factor": 8.0},
        },
    ),
    "phimoe_longrope": (  # its embedding scales by the length as well
        "PhimoeConfig",
        {
            "max_position_embeddings": 256,
            "sliding_window": None,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": _LONGROPE
            | {"original_max_position_embeddings": BORDER, "short_mscale": 1.1, "long_mscale": 1.4},
        },
    ),
    "llama_dynamic": (
        "LlamaConfig",
        {
            "max_position_embeddings": BORDER,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 8.0},
        },
    ),
    "llama_yarn": (
        "LlamaConfig",
        {
            "max_position_embeddings": BORDER,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "original_max_position_embeddings": BORDER,
            },
        },
    ),
}
