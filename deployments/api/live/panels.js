// Everything that each document may change: tiles, pools, prompts, hand-offs, refusals, planner, events.
import { bytes, clock, count, el, find, lasting, percent, renew, say, seconds, svg, times } from "./dom.js";

const POOL_NAMES = { prefill: "Prefill", decode: "Decode" };
const REASONS = {
  queued_tokens: "too many prompt tokens wait",
  ttft: "the first token would come too late",
  fair_share: "the key had its share of the queue",
};
const ORIGINS = [
  ["decode_cache", "dcache", "found cached in the decode pool"],
  ["prefill_cache", "pcache", "found cached in the prefill pool"],
  ["tier", "tier", "brought from the shared tier"],
  ["prefill", "prefill", "computed by the prefill pool"],
  ["decode", "dprompt", "computed by the decode pool"],
];

export function show(live) {
  renew(find("tiles"), ...tiles(live));
  renew(find("pools"), ...Object.entries(live.pools).map(([name, pool]) => poolCard(name, pool)));
  renew(find("where"), ...where(live));
  renew(find("handoff"), ...handoff(live));
  renew(find("refusals"), ...refusals(live));
  renew(find("planner"), ...planner(live.planner));
  renew(find("events"), ...events(live));
}

const minutes = (live) => (live.window_s < 10 ? "few seconds" : lasting(live.window_s));

function* tiles(live) {
  const { ttft_s: ttft, itl_s: itl } = live.latency;
  const rest = ({ p50, p99, count }) => (count ? `p50 ${say(seconds(p50))} · p99 ${say(seconds(p99))}` : (live.window_s < 10 ? "none yet" : `none in ${minutes(live)}`));
  yield tile("First token, p95", seconds(ttft.p95), rest(ttft));
  yield tile("Between tokens, p95", seconds(itl.p95), rest(itl));
  const { ratio, prompt, generated } = live.tokens;
  const shown = ratio === null ? count(null) : { text: ratio >= 100 ? ratio.toFixed(0) : ratio.toFixed(1), unit: ": 1" };
  yield tile("Prefill : decode", shown, `${say(count(prompt))} tok in, ${say(count(generated))} out`);
  yield tile("Generated", { ...count(live.tokens.generated_per_s), unit: `${count(live.tokens.generated_per_s).unit} tok/s` }, `${say(count(live.tokens.prompt_per_s))} prompt tok/s`);
  yield tile("Prompts cached", percent(live.prompts.cached_share), `${say(count(live.tokens.computed))} tokens computed`);
  if (live.mode === "colocated") yield tile("Hand-offs", count(null), "one pool does both");
  else {
    const hidden = live.handoff.hidden_share;
    yield tile("Hand-off hidden", percent(hidden), `${say(count(live.handoff.per_s))} hand-offs/s`);
  }
}

function tile(title, { text, unit }, below) {
  const isNone = text === "–";
  return el("div", { class: "tile" }, el("h3", {}, title), el("p", { class: isNone ? "big none" : "big" }, text, unit && !isNone ? el("small", {}, unit) : null), el("p", { class: "soft" }, below));
}

function poolCard(name, pool) {
  const states = Object.entries(pool.states).map(([state, n]) => `${n} ${state.toLowerCase()}`);
  const head = el("header", {}, el("h3", {}, POOL_NAMES[name]), el("p", {}, states.join(", ")));
  const body = pool.replicas.length
    ? el("table", {}, el("thead", {}, headings()), el("tbody", {}, pool.replicas.map(replicaRow)))
    : el("p", { class: "empty" }, "No replica has answered yet.");
  return el("div", { class: `card pool ${name}` }, head, body);
}

const headings = () =>
  el("tr", {}, ["Replica", "State"].map((word) => el("th", { scope: "col" }, word)), ["Queued tok", "Running", "KV in use", "Tokens/s"].map((word) => el("th", { scope: "col", class: "num" }, word)));

function replicaRow(replica) {
  const cell = (label, cls, ...children) => el("td", { "data-label": label, class: cls }, children);
  const since = replica.state === "gone" ? `gone ${lasting(replica.since_s)} ago` : replica.state === "silent" ? `silent for ${lasting(replica.since_s)}` : replica.state;
  const name = cell("Replica", "name", replica.name);
  const state = cell("State", "is-state", el("span", { class: `state ${replica.state}` }, since));
  if (replica.state === "gone") {
    return el("tr", {}, name, state, ["Queued tok", "Running", "KV in use", "Tokens/s"].map((label) => cell(label, "num soft", "–")));
  }
  const waiting = replica.num_waiting ? ` (${replica.num_waiting} seq)` : "";
  const use = replica.kv_blocks ? replica.kv_used_blocks / replica.kv_blocks : 0;
  const awaited = replica.num_reserved ? ` + ${replica.num_reserved}` : "";
  return el(
    "tr",
    {},
    name,
    state,
    cell("Queued tok", "num", `${say(count(replica.queued_tokens))}${waiting}`),
    cell("Running", "num", `${replica.num_running}${awaited} of ${replica.max_running}`),
    cell("KV in use", "num", meter(use, say(percent(use)))),
    cell("Tokens/s", "num", say(count(replica.prompt_tokens_per_s + replica.generated_tokens_per_s))),
  );
}

function meter(share, words) {
  const bar = svg("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("rect", { width: 100 * Math.min(1, share), height: 8, rx: 2 }));
  return el("span", { class: "meter" }, bar, el("span", {}, words));
}

function stack(parts) {
  const total = parts.reduce((sum, [, value]) => sum + value, 0);
  let at = 0;
  const rects = parts.filter(([, value]) => value > 0).map(([key, value]) => {
    const width = (100 * value) / total;
    const rect = svg("rect", { class: `k-${key}`, x: at, width: Math.max(0.4, width - 0.3), height: 16 });
    at += width;
    return rect;
  });
  return svg("svg", { class: "stack", viewBox: "0 0 100 16", preserveAspectRatio: "none", "aria-hidden": "true" }, rects);
}

function* where(live) {
  const tokens = live.prompts.tokens;
  const total = Object.values(tokens).reduce((sum, value) => sum + value, 0);
  if (!total) {
    yield el("p", { class: "empty" }, `No prompt in the last ${minutes(live)}.`);
    return;
  }
  const origins = ORIGINS.filter(([name]) => tokens[name] > 0 || ["prefill", "decode"].includes(name)).filter(([name]) => live.mode !== "colocated" || !name.startsWith("prefill"));
  yield stack(origins.map(([name, key]) => [key, tokens[name]]));
  yield rows(origins.map(([name, key, words]) => [el("span", { class: `swatch k-${key}` }, words), say(count(tokens[name])), say(percent(tokens[name] / total))]));
  const { cached, prefill, decode: here } = live.prompts.computed_in;
  const told = live.mode === "colocated" ? "" : ` ${times(prefill, "prompt was", "prompts were")} computed by prefill, ${count(here).text} by decode, ${times(cached, "was", "were")} cached whole.`;
  yield el("p", { class: "note" }, `Tokens of prompts, last ${minutes(live)}.${told}`);
}

const rows = (lines) => el("table", { class: "rows" }, el("tbody", {}, lines.map(([first, ...others]) => el("tr", {}, el("td", {}, first), others.map((other) => el("td", { class: "num" }, other))))));

function* handoff(live) {
  const told = live.handoff;
  if (live.mode === "colocated") {
    yield el("p", { class: "empty" }, "The decode pool computes prompts itself (mode=colocated).");
    return;
  }
  if (!told.requests && !told.failures) {
    yield el("p", { class: "empty" }, `No prompt was handed over in the last ${minutes(live)}.`);
    return;
  }
  if (told.hidden_share !== null) yield stack([["prefill", told.hidden_s], ["warn", told.exposed_s]]);
  const lines = [["prompts handed over", say(count(told.requests))], ["KV sent", `${say(bytes(told.bytes))}, ${say(bytes(told.bytes_per_s))}/s`]];
  if (told.hidden_share !== null) {
    lines.unshift([el("span", { class: "swatch k-warn" }, "exposed, after it"), say(percent(1 - told.hidden_share))]);
    lines.unshift([el("span", { class: "swatch k-prefill" }, "hidden, while prompts were computed"), say(percent(told.hidden_share))]);
  }
  lines.push(["failed", say(count(told.failures))]);
  yield rows(lines);
}

function* refusals(live) {
  if (!live.refusals.length) {
    yield el("p", { class: "empty" }, `Nobody was refused in the last ${minutes(live)}.`);
    return;
  }
  yield rows(live.refusals.map(({ reason, priority, count: n }) => [`${REASONS[reason] ?? reason} (${priority} priority)`, say(count(n))]));
  yield el("p", { class: "note" }, `Calls answered with 429, last ${minutes(live)}.`);
}

function* planner({ is_on: isOn, decisions }) {
  if (!isOn) {
    yield el("p", { class: "empty" }, "Off: Ray Serve scales each pool by its open requests. planner.enabled=true turns it on.");
  } else if (!decisions.length) {
    yield el("p", { class: "empty" }, "It has decided nothing yet.");
  } else {
    yield el("ol", { class: "entries", tabindex: 0, "aria-label": "Decisions, the newest first" }, decisions.toReversed().map(decision));
  }
}

function decision({ at_s, before, targets, reason, is_dry_run }) {
  const changes = Object.keys(POOL_NAMES).filter((pool) => pool in targets).map((pool) => `${pool} ${before[pool]}${before[pool] === targets[pool] ? "" : ` → ${targets[pool]}`}`);
  return el("li", {}, el("time", {}, clock(at_s)), el("p", {}, el("b", {}, changes.join(", ")), is_dry_run ? " (dry run)" : ""), el("p", {}, reason));
}

function* events(live) {
  if (!live.events.length) {
    yield el("p", { class: "empty" }, "None since this ingress replica started.");
    return;
  }
  const words = { came: "serves", gone: "is gone", flipped: "flipped to this pool" };
  yield el("ol", { class: "entries", tabindex: 0, "aria-label": "Replicas, the newest first" }, live.events.toReversed().map(({ at_s, pool, replica, kind }) =>
    el("li", {}, el("time", {}, clock(at_s)), el("p", {}, `${pool} replica `, el("code", {}, replica), ` ${words[kind]}`))));
}
