// OpenAI's client for Node: whole, streamed, parsed, and with tools.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { assert, Question, text, Town } from "./wanted.mjs";

export async function talk(url, model) {
  const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
  const messages = [{ role: "user", content: `Which town is it? ${text}` }];
  const asked = { model, messages, max_tokens: 1000, seed: 1 };

  const whole = await client.chat.completions.create({ ...asked, max_tokens: 8 });
  let streamed = "";
  const stream = await client.chat.completions.create({ ...asked, max_tokens: 8, stream: true });
  for await (const chunk of stream) streamed += chunk.choices[0]?.delta?.content ?? "";
  assert.equal(streamed, whole.choices[0].message.content);

  const parsed = await client.chat.completions.parse({ ...asked, response_format: zodResponseFormat(Town, "town") });
  Town.parse(parsed.choices[0].message.parsed);

  const tools = [zodFunction({ name: "population", parameters: Question })];
  const forced = { ...asked, tools, tool_choice: "required", parallel_tool_calls: false };
  const called = await client.chat.completions.parse(forced);
  Question.parse(called.choices[0].message.tool_calls[0].function.parsed_arguments);
  const told = await client.chat.completions.stream(forced).finalChatCompletion();
  assert.deepEqual(told.choices[0].message.tool_calls[0].function, called.choices[0].message.tool_calls[0].function);
}
