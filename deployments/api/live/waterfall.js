// The receipt of one call as a waterfall: who had it when, and for how long.
import { bytes, el, seconds, say, svg } from "./dom.js";

const ROW = 30, BAR = 18, LEFT = 84, RIGHT = 12, TOP = 8, AXIS = 24;

// Bars of each lane: [start, length, kind, words]. Every length was measured by one clock; prefill ends
// where its first token was sent, as in traces, since nobody compares the clocks of two machines.
export function lanes(receipt, totalS) {
  const choice = receipt.choices[0];
  const attempt = choice.attempts.at(-1);
  const told = [["Ingress", [[0, receipt.ingress_s, "other", "read, encoded, admitted"]]]];
  if (!attempt) return told;
  const { decode, handoff } = attempt;
  const prefill = attempt.prefill.find((one) => one.computing_s !== undefined);
  const isResumed = choice.attempts.length > 1, at = isResumed ? attempt.sent_s : receipt.ingress_s;
  const mine = [[at, decode.queued_s ?? 0, "other", "queued"]];
  const firstS = (isResumed && attempt.first_token_s !== null ? at + attempt.first_token_s : choice.ttft_s) ?? totalS;
  if (prefill) {
    const begin = Math.max(at, firstS - prefill.queued_s - prefill.computing_s), computed = begin + prefill.queued_s;
    told.push(["Prefill", [[at, begin - at, "between", "between (calls, queues of the machine)"], [begin, prefill.queued_s, "other", "queued"], [computed, prefill.computing_s, "prefill", "computes the prompt"]]]);
    if (handoff) told.push(["Hand-off", [[firstS - handoff.hidden_s, handoff.hidden_s, "prefill", "hidden"], [firstS, handoff.exposed_s, "warn", "exposed"]]]);
  } else {
    const begin = at + (decode.queued_s ?? 0) + (decode.awaited_s ?? 0), computed = begin + (decode.computing_s ?? 0);
    mine.push([begin, decode.computing_s ?? 0, "dprompt", "computes the prompt"]);
    mine.push([computed, Math.max(0, firstS - computed), "between", "between (calls, queues of the machine)"]);
  }
  const goesOnS = firstS + (prefill && handoff ? handoff.exposed_s : 0), nextS = decode.next_token_s ?? 0;
  if (nextS) mine.push([goesOnS, nextS, "a", "next token"]);
  mine.push([goesOnS + nextS, Math.max(0, totalS - goesOnS - nextS), "decode", "the rest"]);
  told.push(["Decode", mine]);
  return told;
}

export function waterfall(receipt, totalS, width) {
  const rows = lanes(receipt, totalS);
  const ends = rows.flatMap(([, bars]) => bars.map(([start, length]) => start + length));
  const span = Math.max(totalS, ...ends);
  const height = TOP + rows.length * ROW + AXIS;
  const x = (s) => LEFT + (s / span) * (width - LEFT - RIGHT);
  const parts = [];
  for (const s of ticks(span, width < 500 ? 3 : 6)) {
    parts.push(svg("line", { class: "grid", x1: x(s), x2: x(s), y1: TOP, y2: height - AXIS }));
    parts.push(svg("text", { x: x(s), y: height - 8, "text-anchor": "middle" }, say(seconds(s))));
  }
  rows.forEach(([name, bars], i) => {
    const y = TOP + i * ROW + (ROW - BAR) / 2;
    parts.push(svg("text", { class: "lane", x: 0, y: y + 13 }, name));
    for (const [start, length, kind, words] of bars.filter(([, length]) => length > 0)) {
      const wide = Math.max(1.5, x(start + length) - x(start));
      parts.push(svg("rect", { class: `k-${kind}`, x: x(start), y, width: wide, height: BAR, rx: 3 }, svg("title", {}, `${name}: ${words}, ${say(seconds(length))}`)));
    }
  });
  const firstS = receipt.choices[0].ttft_s;
  if (firstS !== null) {
    parts.push(svg("line", { class: "at", x1: x(firstS), x2: x(firstS), y1: 0, y2: height - AXIS }));
  }
  const words = rows.map(([name, bars]) => `${name}: ${bars.map(([, length, , what]) => `${what} ${say(seconds(length))}`).join(", ")}`).join("; ");
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Waterfall. ${words}` }, parts);
  return el("div", { class: "falls" }, drawing, keys(rows));
}

const keys = (rows) =>
  el("ul", { class: "keys" }, rows.flatMap(([name, bars]) => bars.filter(([, length]) => length > 0).map(([, length, kind, words]) => el("li", { class: `k-${kind}` }, `${name}: ${words} `, el("b", {}, say(seconds(length)))))));

// Round seconds, some more than `few` of them at most.
function ticks(span, few) {
  const power = 10 ** Math.floor(Math.log10(span / few));
  const step = [1, 2, 5, 10].map((n) => n * power).find((step) => span / step <= few);
  return Array.from({ length: Math.floor(span / step) + 1 }, (_, i) => i * step);
}

// Facts that are whole sentences.
const SENTENCES = new Set(["Why there", "Resumed"]);

export function facts(receipt, usage, totalS) {
  const choice = receipt.choices[0];
  const attempt = choice.attempts.at(-1);
  const told = [["First token", say(seconds(choice.ttft_s))], ["Whole answer", say(seconds(totalS))], ["Prompt", `${usage.prompt_tokens} tokens, ${usage.prompt_tokens_details.cached_tokens} cached`], ["Answer", `${usage.completion_tokens} tokens`]];
  if (attempt) {
    const prefill = attempt.prefill.find((one) => one.computing_s !== undefined);
    if (prefill) told.push(["Prompt computed by", `prefill ${prefill.replica}, ${say(seconds(prefill.computing_s))}`]);
    else if (attempt.decode.computing_s) told.push(["Prompt computed by", `decode ${attempt.decode.replica}, ${say(seconds(attempt.decode.computing_s))}`]);
    if (attempt.handoff) told.push(["Hand-off", `${say(bytes(attempt.handoff.bytes))}: ${say(seconds(attempt.handoff.hidden_s))} hidden, ${say(seconds(attempt.handoff.exposed_s))} exposed`]);
    told.push(["Decoded by", attempt.decode.replica]);
    if (attempt.decode.reason) told.push(["Why there", attempt.decode.reason]);
  }
  if (choice.attempts.length > 1) told.push(["Resumed", choice.attempts.slice(0, -1).map((lost) => lost.error).join("; ")]);
  return el("dl", { class: "facts" }, told.map(([name, value]) => el("div", SENTENCES.has(name) ? { class: "wide" } : {}, el("dt", {}, name), el("dd", {}, value))));
}
