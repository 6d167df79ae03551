// Asks for the numbers while somebody looks, and shows them. Nothing is asked while the page is hidden or paused.
import { Chart } from "./chart.js";
import { clock, count, el, faultOf, find, inShort, lasting, percent, renew, say, seconds } from "./dom.js";
import { show } from "./panels.js";
import { explain, setUpPrompt } from "./prompt.js";

const PERIOD_MS = 2000;
// Whatever Retry-After says.
const LONGEST_REST_S = 600;
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

// Where the service has keys, the page comes with this word: nothing is asked without one.
const NEEDS_KEY = "needsKey" in document.documentElement.dataset;

let timer = null, isPaused = false, lastS = null, restsUntilMs = 0;
const headers = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
};

async function poll() {
  clearTimeout(timer);
  timer = null;
  if (isPaused || document.hidden) return;
  const key = sessionStorage.getItem(KEY), restMs = restsUntilMs - performance.now();
  if (key === null ? NEEDS_KEY : faultOf(key)) return askForKey(key && faultOf(key));
  if (restMs > 0) return void (timer = setTimeout(poll, restMs));
  let waitMs = PERIOD_MS;
  try {
    const response = await fetch("live", { headers: headers(), signal: AbortSignal.timeout(10_000) });
    if (response.status === 401 || response.status === 403) return askForKey(key && (await explain(response)));
    if (response.status === 429) waitMs = rest(response.headers);
    else if (!response.ok) throw new Error(`the service answered ${response.status}`);
    else take(await response.json());
  } catch (error) {
    lose(error);
  }
  clearTimeout(timer);
  timer = setTimeout(poll, waitMs);
}

function take(live) {
  lastS = live.at_s;
  find("key-form").hidden = true;
  find("live").hidden = false;
  find("live").classList.remove("stale");
  find("banner").hidden = true;
  find("legend").hidden = live.mode === "colocated";
  document.title = `kvrelay · ${live.model}`;
  renew(find("served"), el("b", {}, live.model), live.mode === "colocated" ? ", prefill and decode in one pool" : ", prefill and decode apart");
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
  warn(`The service does not answer (${error.message}).`);
}

// The service says that it is asked too often; how many milliseconds it shall be left alone.
function rest(headers) {
  const limit = headers.get("x-ratelimit-limit-requests");
  const waitS = Math.min(LONGEST_REST_S, Math.max(PERIOD_MS / 1000, Number(headers.get("retry-after")) || 0));
  mark("warn", limit ? "Limit of the key reached" : "Too busy to answer");
  warn(`${limit ? `Your key's limit of ${limit} requests per minute is used up, and this page makes ${60_000 / PERIOD_MS}` : "The service has too much to do to answer"}: asked again in ${lasting(waitS)}.`);
  restsUntilMs = performance.now() + waitS * 1000;
  return waitS * 1000;
}

// Says why the numbers are no newer than they are.
function warn(words) {
  find("live").classList.add("stale");
  const told = lastS ? `${words} The numbers below are of ${clock(lastS)}.` : words;
  if (find("banner").textContent !== told) find("banner").textContent = told;
  find("banner").hidden = false;
}

// In place of the numbers; says what is wrong with the key that there was, if there was one.
function askForKey(fault) {
  sessionStorage.removeItem(KEY);
  mark("warn", "Key needed");
  find("live").hidden = true;
  find("banner").hidden = true;
  const isNew = find("key-form").hidden;
  find("key-form").hidden = false;
  if (fault) find("key-reason").textContent = `${fault}.`;
  if (isNew || fault) find("key").focus();
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = find("key").value.trim(), fault = faultOf(key);
  if (fault) return askForKey(fault);
  sessionStorage.setItem(KEY, key);
  restsUntilMs = 0;
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
