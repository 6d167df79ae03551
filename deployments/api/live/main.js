// Asks for the numbers while somebody looks, and shows them. Nothing is asked while the page is hidden or paused.
import { Chart } from "./chart.js";
import { clock, count, el, find, inShort, isSendable, lasting, percent, say, seconds } from "./dom.js";
import { show } from "./panels.js";
import { setUpPrompt } from "./prompt.js";

const PERIOD_MS = 2000;
const KEY = "kvrelay-key";
const inSeconds = (value) => say(seconds(value)), inCounts = (value) => say(count(value)), inPercent = (value) => say(percent(value));
const quantiles = (name) => ["p50", "p95", "p99"].map((label, i) => ({ key: "abc"[i], label, of: `${name}_${label}_s` }));
const perPool = (name) => ["prefill", "decode"].map((pool) => ({ key: pool, label: pool, of: `${pool}_${name}` }));
const CHARTS = [
  new Chart("Time to first token", quantiles("ttft"), inSeconds, { floor: 0.01 }),
  new Chart("Gap between tokens", quantiles("itl"), inSeconds, { floor: 0.001 }),
  new Chart("Tokens per second", [{ key: "prefill", label: "computed of prompts", of: "computed_per_s" }, { key: "decode", label: "generated", of: "generated_per_s" }], inCounts, { floor: 10 }),
  new Chart("Prompt tokens that wait", perPool("queued_tokens"), inCounts, { floor: 10 }),
  new Chart("Sequences in the batch", perPool("running"), inCounts, { floor: 4 }),
  new Chart("KV pool in use", perPool("kv_use"), inPercent, { floor: 0.1, ceiling: 1 }),
];

let timer = null, isPaused = false, lastS = null;
const headers = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
};
const UNSENDABLE = { message: "The key has a character that no key has, such as a long dash or an unseen space: type it, or copy it anew" };

async function poll() {
  clearTimeout(timer);
  timer = null;
  if (isPaused || document.hidden) return;
  if (!isSendable(sessionStorage.getItem(KEY) ?? "none")) return refuseKey();
  try {
    const response = await fetch("live", { headers: headers(), signal: AbortSignal.timeout(10_000) });
    if (response.status === 401 || response.status === 403) return askForKey(await response.json());
    if (!response.ok) throw new Error(`the service answered ${response.status}`);
    take(await response.json());
  } catch (error) {
    lose(error);
  }
  clearTimeout(timer);
  timer = setTimeout(poll, PERIOD_MS);
}

function take(live) {
  lastS = live.at_s;
  find("key-form").hidden = true;
  find("live").hidden = false;
  find("live").classList.remove("stale");
  find("banner").hidden = true;
  document.title = `kvrelay · ${live.model}`;
  find("served").replaceChildren(el("b", {}, live.model), live.mode === "colocated" ? ", prefill and decode in one pool" : ", prefill and decode apart");
  sayStatus(live);
  show(live);
  for (const chart of CHARTS) chart.update(live.history);
  const { asked, answered } = live.ingresses;
  const of = asked === 1 ? "" : ` Clients' numbers are of ${answered} of ${asked} ingress replicas.`;
  find("foot").textContent = `kvrelay ${live.version}, ${clock(live.at_s)}. Percentiles are estimated within the buckets of /metrics.${of}`;
}

function sayStatus(live) {
  const lost = Object.entries(live.pools).flatMap(([pool, { replicas }]) => replicas.filter(({ state }) => state === "silent" || state === "gone").map((replica) => ({ pool, ...replica })));
  const [worst] = lost;
  if (live.health.status !== "ok") return mark("bad", `Cannot serve: ${live.health.reason}`);
  if (live.health.reason) return mark("good", `Serving: ${live.health.reason}`);
  if (worst) return mark("warn", `${worst.pool} replica ${worst.state === "gone" ? "is gone" : `silent for ${lasting(worst.since_s)}`}`);
  mark("good", "Serving");
}

function mark(kind, words) {
  const status = find("status"), shown = inShort(words);
  status.className = `status ${kind}`;
  status.title = shown === words ? "" : words;
  if (status.textContent !== shown) status.textContent = shown;
}

function lose(error) {
  mark("bad", "No answer");
  find("live").classList.add("stale");
  find("banner").hidden = false;
  find("banner").textContent = `The service does not answer (${error.message}).${lastS ? ` The numbers below are of ${clock(lastS)}.` : ""}`;
}

function askForKey({ error }, isTold = sessionStorage.getItem(KEY) !== null) {
  mark("warn", "Key needed");
  find("live").hidden = true;
  find("key-form").hidden = false;
  if (isTold) find("key-reason").textContent = `${error.message}.`;
  find("key").focus();
}

function refuseKey() {
  sessionStorage.removeItem(KEY);
  askForKey({ error: UNSENDABLE }, true);
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = find("key").value.trim();
  if (!isSendable(key)) return refuseKey();
  sessionStorage.setItem(KEY, key);
  void poll();
});
find("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  find("pause").setAttribute("aria-pressed", String(isPaused));
  find("pause").textContent = isPaused ? "Go on" : "Pause";
  if (!isPaused) void poll();
});
document.addEventListener("visibilitychange", () => void poll());
find("charts").replaceChildren(...CHARTS.map((chart) => chart.element));
setUpPrompt(headers);
void poll();
