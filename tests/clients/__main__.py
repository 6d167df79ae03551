"""Has clients talk to an API: `python -m tests.clients URL MODEL NAME...`, in an environment that has them.

All in one process, since most of what a client takes is its start, and at once, since the engine batches what they ask.
Writes a line of JSON for each client that is done, `{"client": NAME, "error": null or the traceback}`.
"""

import importlib
import json
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed

url, model, *names = sys.argv[1:]


def talk(name: str) -> None:
    importlib.import_module(f"tests.clients.{name}_client").talk(url, model)


with ThreadPoolExecutor(len(names)) as threads:
    talks = {threads.submit(talk, name): name for name in names}
    for done in as_completed(talks):
        error = done.exception()
        told = "".join(traceback.format_exception(error)) if error else None
        print(json.dumps({"client": talks[done], "error": told}), flush=True)
