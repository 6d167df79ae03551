"""What grammars cost an engine on this CPU: compiling, masks, and steps of 16 sequences with and without.

And what compiling costs others: steps of 15 sequences while the engine compiles for 5 s, and how long a thread beside
the compiler is kept from running. One grammar does not take that long: the bounds of `deployments/grammars.py` end each
after 1 to 2 s. So several come at once, none of which is known, and are compiled one after the other.

`make bench-structured`: a table, and a line of JSON. Rounds with and without grammars take turns; medians are told.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.model.load import load_model
from deployments.engine.model.resolve import resolve_model
from deployments.engine.process import configure_process
from deployments.engine.sampling.masking import Masking
from deployments.grammars import read_vocabulary
from deployments.messages import GenerateRequest, Grammar, SamplingParams
from tests.bench.progress import note

BATCH_SIZE = 16
# Never whole before `max_tokens`, so that all rounds draw as many tokens.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20, "maxLength": 400},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,12}$"}, "minItems": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["tags", "name", "age"],
    "additionalProperties": False,
}
# Takes long to compile: thousands of optional properties, as many as fit.
LONG = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2200)}}


def grammar_of(schema: dict[str, Any], end_token_ids: tuple[int, ...]) -> Grammar:
    from llguidance import LLMatcher

    return Grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)), end_token_ids, "bench")


def measure_masks(folder: str, vocab_size: int, ends: tuple[int, ...], num_tokens: int) -> dict[str, float]:
    """Compile times, and the time from a token to the next mask, of answers drawn at random."""
    begun_s = time.perf_counter()
    vocabulary = read_vocabulary(folder, vocab_size, ends)
    vocabulary_s = time.perf_counter() - begun_s
    grammar = grammar_of(SCHEMA, ends)
    begun_s = time.perf_counter()
    vocabulary.compile(grammar)
    compile_s = time.perf_counter() - begun_s
    begun_s = time.perf_counter()
    vocabulary.compile(grammar_of(LONG, ends)).mask()
    long_s = time.perf_counter() - begun_s
    random, masks_s, guide = np.random.default_rng(0), [], vocabulary.compile(grammar)
    token: list[int] = []
    for number in range(num_tokens):
        begun_s = time.perf_counter()
        guide.take(token)
        mask = guide.mask()
        masks_s.append(time.perf_counter() - begun_s)
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        token = [int(random.choice(allowed))]
        if token[0] in ends or number % 100 == 99:
            guide, token = vocabulary.compile(grammar), []
    packed = np.frombuffer(mask * BATCH_SIZE, np.uint8).reshape(BATCH_SIZE, -1)
    return {
        "vocabulary_s": vocabulary_s,
        "compile_ms": 1e3 * compile_s,
        "long_compile_and_mask_s": long_s,
        "mask_mean_us": 1e6 * statistics.fmean(masks_s),
        "mask_p99_us": 1e6 * float(np.percentile(masks_s, 99)),
        "apply_16_ms": 1e3 * apply_s(Masking(np.arange(BATCH_SIZE), packed), vocab_size),
    }


def apply_s(masking: Masking, vocab_size: int) -> float:
    import torch

    logits = torch.randn(BATCH_SIZE, vocab_size)
    return statistics.median(timed(lambda: masking.apply(logits)) for _ in range(30))


def timed(run: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    run()
    return time.perf_counter() - begun_s


def measure_steps(engine: Engine, grammar: Grammar | None, num_steps: int) -> float:
    """Seconds per token of each of 16 sequences, once all of them have drawn."""
    sampling = SamplingParams(max_tokens=num_steps + 8, seed=1, grammar=grammar)
    for number in range(BATCH_SIZE):
        own = replace(sampling, seed=number)
        engine.add(GenerateRequest(f"r{number}", tuple(range(10 + number, 26 + number)), own))
    drawn: dict[str, int] = {}

    def step() -> None:
        for event in engine.step():
            drawn[event.request_id] = drawn.get(event.request_id, 0) + bool(getattr(event, "token_ids", ()))

    while len(drawn) < BATCH_SIZE or min(drawn.values()) < 2:
        step()
    before, begun_s = sum(drawn.values()), time.perf_counter()
    while sum(drawn.values()) - before < num_steps * BATCH_SIZE:
        step()
    seconds = (time.perf_counter() - begun_s) * BATCH_SIZE / (sum(drawn.values()) - before)
    for number in range(BATCH_SIZE):
        engine.abort(f"r{number}")
    while engine.has_work:
        engine.step()
    return seconds


def long_schema(number: int) -> dict[str, Any]:
    """As `LONG`, and different from all others."""
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2200 - number)}}


def start_plain(engine: Engine, num_sequences: int) -> None:
    """Sequences without grammars that draw in every step, and never end by themselves."""
    sampling = SamplingParams(max_tokens=4000, seed=1)
    for number in range(num_sequences):
        own = replace(sampling, seed=number)
        engine.add(GenerateRequest(f"plain{number}", tuple(range(10 + number, 26 + number)), own))


def measure_gaps(engine: Engine, compile_s: float, ends: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds from one token of a sequence to its next: alone, beside a busy core, during compiles.

    Each for `compile_s`. The core is taken by a process that has nothing to do with the engine: gaps during compiles
    that are no longer are due to the core that compiling takes, and not to what it blocks.
    """
    start_plain(engine, BATCH_SIZE - 1)
    for _ in range(10):
        engine.step()
    alone = steps_for(engine, compile_s)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        beside = steps_for(engine, compile_s)
        busy.kill()
    begun_s, num_compiled, during = time.perf_counter(), 0, []
    while time.perf_counter() - begun_s < compile_s:
        name = f"guided{num_compiled}"
        grammar = grammar_of(long_schema(num_compiled), ends)
        engine.add(GenerateRequest(name, tuple(range(10, 26)), SamplingParams(max_tokens=1, grammar=grammar)))
        is_compiled = False
        while not is_compiled:
            begun_step_s = time.perf_counter()
            events = engine.step()
            during.append(time.perf_counter() - begun_step_s)
            is_compiled = any(event.request_id == name and getattr(event, "token_ids", ()) for event in events)
        num_compiled += 1
    took_s = time.perf_counter() - begun_s
    for number in range(BATCH_SIZE - 1):
        engine.abort(f"plain{number}")
    while engine.has_work:
        engine.step()
    gaps = {"num_compiled": float(num_compiled), "compiling_s": took_s}
    for name, samples in (("alone", alone), ("busy_core", beside), ("compiling", during)):
        for which, share in (("p50", 50), ("p99", 99), ("max", 100)):
            gaps[f"gap_{name}_{which}_ms"] = 1e3 * float(np.percentile(samples, share))
    return gaps


def steps_for(engine: Engine, seconds: float) -> list[float]:
    """How long each step takes, for so many seconds."""
    samples, until_s = [], time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        samples.append(timed(engine.step))
    return samples


def measure_beats(folder: str, vocab_size: int, ends: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds at most between two beats of a thread, one in each, beside a thread that compiles or sleeps."""
    vocabulary = read_vocabulary(folder, vocab_size, ends)
    grammar = grammar_of(long_schema(1000), ends)
    beats = {}
    for name, work in (("sleeping", lambda: time.sleep(1)), ("compiling", lambda: vocabulary.compile(grammar).mask())):
        worker = threading.Thread(target=work)
        worker.start()
        last_s, longest_s = time.perf_counter(), 0.0
        while worker.is_alive():
            time.sleep(0.001)
            now_s = time.perf_counter()
            last_s, longest_s = now_s, max(longest_s, now_s - last_s)
        beats[f"beat_{name}_max_ms"] = 1e3 * longest_s
    return beats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--masks", type=int, default=2000)
    parser.add_argument("--compile-s", type=float, default=5.0, help="of compiling, beside others' tokens")
    args = parser.parse_args()
    configure_process(1)
    note("masks and their compiling")
    loaded = load_model(EngineConfig(model=args.model))
    found = measure_masks(resolve_model(args.model), loaded.vocab_size, loaded.eos_token_ids, args.masks)
    found |= measure_beats(resolve_model(args.model), loaded.vocab_size, loaded.eos_token_ids)
    note(f"steps, {args.rounds} rounds")
    engine = Engine(loaded, EngineConfig(model=args.model))
    grammar = grammar_of(SCHEMA, loaded.eos_token_ids)
    for one in (None, grammar):
        measure_steps(engine, one, 2)
    samples = [
        (measure_steps(engine, None, args.steps), measure_steps(engine, grammar, args.steps))
        for _ in range(args.rounds)
    ]
    note("gaps of others beside compiling")
    found |= measure_gaps(engine, args.compile_s, loaded.eos_token_ids)
    plain, guided = (statistics.median(side) for side in zip(*samples, strict=True))
    found |= {"plain_step_ms": 1e3 * plain, "guided_step_ms": 1e3 * guided, "cost": guided / plain - 1}
    for name, value in found.items():
        print(f"{name:26} {value:10.3f}")
    print(json.dumps(found | {"samples_ms": [[1e3 * a, 1e3 * b] for a, b in samples]}))


if __name__ == "__main__":
    main()
