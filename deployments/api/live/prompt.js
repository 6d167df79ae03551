// The box to try a prompt: streams an answer, colours its tokens, and draws the receipt.
import { el, find } from "./dom.js";
import { facts, waterfall } from "./waterfall.js";

let running = null;

export function setUpPrompt(headers) {
  find("prompt-form").addEventListener("submit", (event) => {
    event.preventDefault();
    void ask(headers);
  });
  find("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("prompt-form").requestSubmit();
  });
  find("stop").addEventListener("click", () => running?.abort());
}

function body() {
  const prompt = find("prompt").value, isChat = find("kind").value === "chat";
  const asked = isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const streams = { stream: true, stream_options: { include_usage: true, include_receipt: true } };
  return [isChat ? "v1/chat/completions" : "v1/completions", { ...asked, ...streams, max_tokens: Number(find("max-tokens").value) }];
}

async function ask(headers) {
  if (running) return;
  running = new AbortController();
  turn(find("stop"), find("send"));
  const answer = find("answer");
  answer.replaceChildren();
  answer.setAttribute("aria-busy", "true");
  find("receipt").replaceChildren();
  const [path, asked] = body(), began = performance.now();
  try {
    const response = await fetch(path, { method: "POST", body: JSON.stringify(asked), headers: { "content-type": "application/json", ...headers() }, signal: running.signal });
    if (!response.ok) throw new Error(await explain(response));
    for await (const chunk of events(response.body)) take(chunk, answer, (performance.now() - began) / 1000);
    if (!answer.childElementCount) answer.append(el("p", { class: "empty" }, "The model ended its answer at once."));
  } catch (error) {
    const words = error.name === "AbortError" ? "Stopped." : error.message;
    answer.append(el("p", { class: error.name === "AbortError" ? "empty" : "error" }, words));
  } finally {
    running = null;
    answer.setAttribute("aria-busy", "false");
    turn(find("send"), find("stop"));
  }
}

// One button works now and the other one does not; it does not take the focus along.
function turn(works, rests) {
  works.disabled = false;
  if (document.activeElement === rests) works.focus();
  rests.disabled = true;
}

// What an answer says that is none.
export async function explain(response) {
  const told = await response.json().catch(() => null);
  return told?.error?.message ?? `the service answered ${response.status}`;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

function take(chunk, answer, elapsedS) {
  if (chunk.error) throw new Error(chunk.error.message);
  for (const choice of chunk.choices) {
    const text = choice.text ?? choice.delta?.content ?? choice.delta?.reasoning_content ?? "";
    if (!text) continue;
    const isBelow = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 40;
    answer.append(el("span", { class: `token ${choice.pool ?? "decode"}`, title: `drawn by ${choice.pool ?? "decode"}` }, text));
    if (isBelow) answer.scrollTop = answer.scrollHeight;
  }
  if (chunk.receipt) draw(chunk.receipt, chunk.usage, elapsedS);
}

function draw(receipt, usage, totalS) {
  const place = find("receipt");
  const note = "Bars are as long as each part said it took, laid so that prefill ends where the first token was sent, the dotted line: the clocks of several machines are not compared. What nobody timed is between them, and the last bar is the rest of the call.";
  place.replaceChildren(el("h3", {}, "What became of it"), waterfall(receipt, totalS, Math.max(320, place.clientWidth)), facts(receipt, usage, totalS), el("p", { class: "note" }, note));
}
