"use strict";
const at = (id) => document.getElementById(id);
let running = null;

const headers = () => ({
  "Content-Type": "application/json",
  ...(at("key").value ? { Authorization: `Bearer ${at("key").value}` } : {}),
});

const gone = (error) => (error instanceof TypeError ? "The server does not answer." : String(error));

async function models() {
  try {
    const answer = await fetch("/v1/models", { headers: headers() });
    const body = await answer.json();
    if (!answer.ok) { at("said").textContent = body.error.message; return; }
    at("said").textContent = "";
    ["first", "second"].forEach((side, number) => {
      at(side).replaceChildren(...body.data.map((model) => new Option(model.id, model.id)));
      at(side).selectedIndex = Math.min(number, body.data.length - 1);
    });
  } catch (error) {
    at("said").textContent = gone(error);
  }
}

function body(model) {
  const prompt = at("prompt").value, chat = at("kind").value === "chat";
  const shared = {
    model, stream: true, stream_options: { include_usage: true }, max_tokens: Number(at("tokens").value),
    temperature: Number(at("temperature").value), seed: Number(at("seed").value),
  };
  return chat ? { ...shared, messages: [{ role: "user", content: prompt }] } : { ...shared, prompt };
}

// Whether there is an answer, to its end.
async function ask(side, signal) {
  const path = at("kind").value === "chat" ? "/v1/chat/completions" : "/v1/completions";
  const text = at(`${side}-text`), end = at(`${side}-end`);
  text.textContent = end.textContent = "";
  const request = { method: "POST", headers: headers(), body: JSON.stringify(body(at(side).value)), signal };
  const answer = await fetch(path, request);
  if (!answer.ok) { end.textContent = (await answer.json()).error.message; return false; }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", why = "", counted = "", whole = true;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const told = JSON.parse(event.slice(6));
      if (told.error) { why = told.error.message; whole = false; continue; }
      if (told.usage) counted = `${told.usage.prompt_tokens} + ${told.usage.completion_tokens} tokens`;
      for (const choice of told.choices) {
        text.append(choice.delta ? choice.delta.content ?? "" : choice.text);
        why = choice.finish_reason ?? why;
      }
    }
  }
  end.textContent = [counted, why && `ended by: ${why}`].filter(Boolean).join(", ");
  return whole;
}

function compare() {
  const texts = ["first-text", "second-text"].map((id) => at(id).textContent);
  let same = 0;
  while (same < Math.min(texts[0].length, texts[1].length) && texts[0][same] === texts[1][same]) same += 1;
  if (texts[0] === texts[1]) { at("said").textContent = "Both say the same."; return; }
  at("said").textContent = `The first ${same} characters are the same.`;
  ["first-text", "second-text"].forEach((id, number) => {
    const mark = document.createElement("mark");
    mark.textContent = texts[number].slice(same);
    at(id).replaceChildren(texts[number].slice(0, same), mark);
  });
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  running?.abort();
  const mine = (running = new AbortController());
  const say = (what) => { if (running === mine) at("said").textContent = what; }; // another request has taken its place
  at("halt").disabled = false;
  say("Asking both.");
  try {
    if (!at("first").value) await models();
    const answered = await Promise.all(["first", "second"].map((side) => ask(side, mine.signal)));
    if (running !== mine) return;
    if (answered.every(Boolean)) compare();
    else say("Not both have answered.");
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : gone(error));
  } finally {
    if (running === mine) at("halt").disabled = true;
  }
});
at("halt").addEventListener("click", () => running?.abort());
at("key").addEventListener("change", models);
// An answer stands below the name of the model that gave it.
["first", "second"].forEach((side) => at(side).addEventListener("change", () => {
  running?.abort();
  at(`${side}-text`).textContent = at(`${side}-end`).textContent = at("said").textContent = "";
}));
models();
