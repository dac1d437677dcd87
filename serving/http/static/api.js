// The server's own interface, as this page uses it.

/** An answer that is an error; `status` is 0 if there was no answer at all. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function ask(path, key, body, signal) {
  const headers = { "content-type": "application/json" };
  // What a header can't hold is in no key: let the server say so, not fetch.
  if (key) headers.authorization = `Bearer ${key.trim().replace(/[^\x20-\x7e]/g, "?")}`;
  let response;
  try {
    response = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Refused(told?.error?.message ?? `${response.status} ${response.statusText}`, response.status);
}

/** The served model: its id, and whether it has a chat template. */
export async function model(key) {
  return (await (await ask("v1/models", key)).json()).data[0];
}

/** How many tokens a text has. */
export async function countTokens(text, key) {
  return (await (await ask("tokenize", key, { prompt: text, add_special_tokens: false })).json()).count;
}

/**
 * Streams an answer.
 *
 * @param {object} request `model` (with `id` and `has_chat_template`), `messages`, `temperature` (null: the model's
 *   own), `maxTokens`, `key`, `signal`.
 * @yields {{text: string, reason: ?string, tokens: ?number}} What is new.
 * @throws {Refused} The server refuses the request, or the answer breaks off.
 */
export async function* answer({ model, messages, temperature, maxTokens, key, signal }) {
  const body = { model: model.id, stream: true, stream_options: { include_usage: true } };
  if (temperature !== null) body.temperature = temperature;
  const chat = model.has_chat_template;
  const response = chat
    ? await ask("v1/chat/completions", key, { ...body, messages, max_completion_tokens: maxTokens }, signal)
    : await ask("v1/completions", key,
                { ...body, prompt: messages.map((m) => m.content).join(""), max_tokens: maxTokens }, signal);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Refused(event.error.message, 200);
    const choice = event.choices[0];
    yield {
      text: (chat ? choice?.delta?.content : choice?.text) ?? "",
      reason: choice?.finish_reason ?? null,
      tokens: event.usage?.completion_tokens ?? null,
    };
  }
  throw new Refused("", 200);
}

/** The data of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
        if (data.length) yield data.join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("", 200);
  } finally {
    reader.cancel().catch(() => {});
  }
}
