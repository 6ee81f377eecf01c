// Talking to the server this page comes from.

export const headers = () => {
  const key = document.getElementById("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
};

export async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

export async function firstModel() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  return (await response.json()).data[0];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// One answer: its text and thoughts as they come, usage, why it ended, and when it began.
export async function ask(body, signal, grown) {
  const result = { text: "", thoughts: "", pieces: 0, usage: null, reason: null, error: null, first: null };
  result.start = performance.now();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal,
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      result.usage = event.usage ?? result.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      result.reason = choice.finish_reason ?? result.reason;
      const { content, reasoning_content: thoughts } = choice.delta;
      if (!content && !thoughts) continue;
      result.first ??= performance.now();
      result.pieces += 1;
      result.text += content ?? "";
      result.thoughts += thoughts ?? "";
      grown(result);
    }
  } catch (error) {
    result.reason = error.name === "AbortError" ? "stopped" : "error";
    result.error = error.message;
  }
  result.end = performance.now();
  return result;
}

// How long an answer took, for the reader.
export function timing(result) {
  const { usage, first, start, reason, pieces } = result;
  const parts = [];
  const count = usage?.completion_tokens ?? pieces;
  if (first !== null) {
    const seconds = ((result.end ?? performance.now()) - first) / 1000;
    parts.push(`${count} tokens`);
    if (count > 1 && seconds > 0) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
    parts.push(`first after ${Math.round(first - start)} ms`);
  }
  if (reason === "length") parts.push("cut at the limit of tokens");
  if (reason === "stopped") parts.push("stopped");
  return parts.join(" \u00b7 ");
}
