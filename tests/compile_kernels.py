"""Compiles the kernels of a CPU once, where several processes would each do it. CI runs it before the tests.

Run: `python -m tests.compile_kernels`. Takes a minute from nothing; numba keeps what it has compiled.
"""

from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.engine_builder import build_engine
from deployments.messages import GenerateRequest, SamplingParams


def main() -> None:
    """Generate a few tokens with the bundled model."""
    engine = build_engine(EngineConfig(speculation=SpeculationConfig(method="ngram"))).engine
    engine.add(GenerateRequest("r", tuple(range(1, 40)), SamplingParams(max_tokens=3, temperature=0.7, top_p=0.9)))
    while engine.has_work:
        engine.step()


if __name__ == "__main__":
    main()
