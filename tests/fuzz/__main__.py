"""`make fuzz`: thousands of cases against the API in this process, with a model that babbles; no engine, no Ray.

Schemathesis sends what `/openapi.json` describes and what it forbids, over HTTP; then the properties of the parsers are
tried with other examples than in the suite, and more of them. Ends with a status other than 0 if anything was found.
"""

import argparse
import asyncio
import os
import subprocess
import sys
from pathlib import Path

from tests.api.fakes import Recorder, serving
from tests.fuzz.babble import build_babbling_app

ROOT = Path(__file__).parents[2]
# What they hold depends on text alone, cut anywhere.
PROPERTIES = (
    "tests/api/test_babble.py",
    "tests/api/test_sse.py",
    "tests/api/test_detokenizer.py",
    "tests/api/test_openapi.py",
    "tests/api/tools/test_parser.py",
    "tests/api/reasoning",
)
# Those that say what a service does with what it is sent. Not `positive_data_acceptance`: JSON Schema cannot say all.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


async def schemathesis(python: str, num_examples: int, arguments: list[str]) -> bool:
    """Whether it finds nothing, and nothing is left behind."""
    recorder = Recorder()
    app, backend = build_babbling_app(recorder)
    async with serving(app) as url:
        command = [python, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS]
        limits = ["--max-examples", str(num_examples), "--request-timeout", "20", "--continue-on-failure"]
        limits += ["--suppress-health-check", "all"]  # how hard it is to make up a path is no fault of the API's
        process = await asyncio.create_subprocess_exec(*command, *limits, *arguments, cwd=ROOT)
        status = await process.wait()
        while len(recorder.outcomes) < recorder.num_started:  # the last client has just left
            recorder.has_finished.clear()
            await asyncio.wait_for(recorder.has_finished.wait(), 60)
    left = [*backend.running, *(ticket for ticket in backend.tickets if not ticket.is_closed)]
    print(f"{recorder.num_started} calls reached the API; left behind: {left or 'nothing'}")
    return status == 0 and not left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="an interpreter with schemathesis")
    parser.add_argument("--examples", type=int, default=1000, help="of each route, and of each property")
    args, others = parser.parse_known_args()
    is_good = asyncio.run(schemathesis(args.python, args.examples, others))
    environment = os.environ | {"KVRELAY_EXAMPLES": str(args.examples)}
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", *PROPERTIES], cwd=ROOT, env=environment, check=False)
    return int(not is_good or tested.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
