// Vercel's SDK by its default provider, which is /v1/responses, and through chats: texts, objects and tools.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { assert, Question, text, Town } from "./wanted.mjs";

export async function talk(url, model) {
  const openai = createOpenAI({ baseURL: url, apiKey: "none" });
  const compatible = createOpenAICompatible({ name: "kvrelay", baseURL: url, supportsStructuredOutputs: true });
  await Promise.all([openai(model), openai.chat(model), compatible(model)].map(ask));
}

async function ask(model) {
  // Nothing is stored here: without this a second step would refer to items of the first.
  const providerOptions = { openai: { store: false, parallelToolCalls: false } };
  const prompt = `Which town is it? ${text}`;
  const asked = { model, prompt, providerOptions, maxOutputTokens: 1000, maxRetries: 0, temperature: 0 };
  const short = { ...asked, maxOutputTokens: 8 };
  assert.equal(await streamText(short).text, (await generateText(short)).text);

  const object = await generateText({ ...asked, output: Output.object({ schema: Town }) });
  Town.parse(object.output);
  const streamed = streamText({ ...asked, output: Output.object({ schema: Town }) });
  Town.parse(await streamed.output);

  const towns = [];
  const population = tool({
    inputSchema: Question,
    execute: ({ town }) => {
      towns.push(town);
      return 2_000_000;
    },
  });
  const agent = await generateText({ ...asked, tools: { population }, toolChoice: "required" });
  assert.equal(agent.finishReason, "tool-calls");
  assert.equal(agent.toolResults.length, towns.length);
  assert.ok(towns.length > 0);
}
