// The page: what is written, sent and shown.

import * as api from "./api.js";
import { switchLanguage, word, writeWords } from "./words.js";

const MAX_TOKENS = 1024;
const $ = (id) => document.getElementById(id);
const log = $("log");

let messages = []; // the conversation as it is sent; the system prompt is not in it
let model = null;
let running = null; // the AbortController of the answer under way

// Settings: kept in the browser, but for the key, which goes with the tab.

const keep = {
  key: sessionStorage, system: localStorage, temperature: localStorage, "max-tokens": localStorage, theme: localStorage,
};

function readSettings() {
  for (const [name, storage] of Object.entries(keep)) $(name).value = storage.getItem(name) ?? $(name).value;
  $("max-tokens").value ||= MAX_TOKENS;
  $("theme").value ||= "auto";
  showTheme();
}

function showTheme() {
  document.documentElement.dataset.theme = $("theme").value;
}

function setting(name) {
  const field = $(name);
  return field.value.trim() === "" || !field.validity.valid ? null : Number(field.value);
}

for (const [name, storage] of Object.entries(keep)) {
  $(name).addEventListener("change", () => storage.setItem(name, $(name).value));
}
$("theme").addEventListener("change", showTheme);
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", () => model || connect());
$("settings").addEventListener("click", (event) => event.target === $("settings") && $("settings").close());

// What is shown.

/** An element with a class and text, never HTML: an answer that has markup shows it as it is. */
function make(tag, name, text = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

/** Writes an answer: fenced code as blocks, `code` and **bold**, and all else as it came. */
function show(element, text) {
  element.replaceChildren();
  text.split(/^```/m).forEach((part, i) => {
    if (i % 2) {
      const [first, ...lines] = part.split("\n");
      const block = make("pre", "code", lines.join("\n").replace(/\n$/, ""));
      block.dataset.language = first.trim();
      block.tabIndex = 0;
      element.append(block);
      return;
    }
    const paragraph = make("div", "text");
    for (const piece of part.replace(/^\n+|\n+$/g, "").split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
      if (/^`.+`$/.test(piece)) paragraph.append(make("code", "", piece.slice(1, -1)));
      else if (/^\*\*.+\*\*$/.test(piece)) paragraph.append(make("strong", "", piece.slice(2, -2)));
      else paragraph.append(piece);
    }
    if (paragraph.textContent) element.append(paragraph);
  });
}

const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 40;
const toEnd = () => { log.scrollTop = log.scrollHeight; };

function addMessage(role, text) {
  $("empty").hidden = true;
  const article = make("article", role);
  article.append(make("h2", "hidden", role === "user" ? word("you") : model?.id ?? ""));
  const body = make("div", "body");
  article.append(body);
  role === "user" ? body.append(make("div", "text", text)) : show(body, text);
  log.append(article);
  toEnd();
  return { article, body };
}

function showModel() {
  $("model").textContent = document.title = model?.id ?? "llm_jax";
  const chat = model?.has_chat_template ?? true;
  $("empty").textContent = word(chat ? "emptyChat" : "emptyText");
  $("system-label").hidden = !chat;
  $("language").textContent = word("other");
}

/** Shows what went wrong; `partial` is the answer that broke off, which another try replaces. */
function showError(error, partial = null) {
  const box = make("article", "error");
  box.setAttribute("role", "alert");
  const retry = make("button", "", word("retry"));
  box.append(make("p", "", error.message || word(error.status ? "broken" : "unreachable")), retry);
  retry.addEventListener("click", () => {
    box.remove();
    partial?.remove();
    if (messages.at(-1)?.role === "assistant") messages.pop();
    messages.length ? reply() : connect();
  });
  log.append(box);
  toEnd();
  if (error.status === 401) $("settings").open || $("settings").showModal();
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  log.setAttribute("aria-busy", String(controller !== null)); // an answer is read out when it is whole
}

// What is done.

async function connect() {
  log.querySelectorAll(".error").forEach((box) => box.remove());
  try {
    model = await api.model($("key").value);
  } catch (error) {
    showError(error);
  }
  showModel();
}

/** Asks for the answer to what has been said. */
async function reply() {
  if (!model) await connect();
  if (!model) return;
  const controller = new AbortController();
  const conversation = messages; // "New chat" begins another one while this answer still comes
  setRunning(controller);
  const { article, body } = addMessage("assistant", "");
  article.classList.add("running");
  const began = performance.now();
  const found = { text: "", pieces: 0, reason: null, tokens: null, first: null, last: began };
  let drawn = true;
  const draw = () => {
    drawn = true;
    const follows = atEnd();
    show(body, found.text);
    if (follows) toEnd();
  };
  let failure = null;
  try {
    const system = $("system").value.trim();
    const said = system && model.has_chat_template ? [{ role: "system", content: system }, ...conversation]
      : conversation;
    const asked = { model, messages: said, temperature: setting("temperature"), maxTokens: setting("max-tokens") ??
      MAX_TOKENS, key: $("key").value, signal: controller.signal };
    for await (const news of api.answer(asked)) {
      if (news.text) {
        found.last = performance.now();
        found.first ??= found.last;
        found.text += news.text;
        found.pieces += 1;
        if (drawn) requestAnimationFrame(draw); // one drawing a frame, however fast the tokens come
        drawn = false;
      }
      found.reason = news.reason ?? found.reason;
      found.tokens = news.tokens ?? found.tokens;
    }
  } catch (error) {
    if (error.name === "AbortError") found.reason = "stopped";
    else if (error instanceof api.Refused) failure = error;
    else throw error;
  } finally {
    setRunning(null);
    article.classList.remove("running");
  }
  if (conversation !== messages) return;
  draw();
  if (found.text || !failure) {
    conversation.push({ role: "assistant", content: found.text });
    await showNumbers(article, found, began);
  } else {
    article.remove();
  }
  if (failure) showError(failure, article);
}

async function showNumbers(article, found, began) {
  const follows = atEnd();
  const line = make("footer", "numbers");
  article.append(line);
  // An answer that was stopped comes without a count.
  found.tokens ??= found.text ? await api.countTokens(found.text, $("key").value).catch(() => null) : 0;
  if (found.tokens && found.first !== null) {
    // Of what came in one piece (the server had the answer already) there is no pace between the first and the last.
    const streamed = found.pieces > 1;
    const seconds = (found.last - (streamed ? found.first : began)) / 1000;
    const rate = Math.max(found.tokens - (streamed ? 1 : 0), 1) / Math.max(seconds, 0.001);
    const first = Math.round(found.first - began);
    line.append(make("span", "", word("numbers")(found.tokens, rate.toFixed(rate < 100 ? 1 : 0), first)));
  }
  if (found.reason && found.reason !== "stop") line.append(make("span", "why", word(found.reason) ?? found.reason));
  const copy = make("button", "", word("copy"));
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(found.text);
    copy.textContent = word("copied");
  });
  if (found.text && navigator.clipboard) line.append(copy);
  if (follows) toEnd();
}

function send() {
  const prompt = $("prompt");
  if (running || !prompt.value.trim()) return;
  const text = model?.has_chat_template === false ? prompt.value : prompt.value.trim();
  log.querySelectorAll(".error").forEach((box) => box.remove());
  if (messages.at(-1)?.role === "user") { // it got no answer: templates want one question after another
    messages.pop();
    [...log.querySelectorAll(".user")].at(-1).classList.add("dropped");
  }
  messages.push({ role: "user", content: text });
  addMessage("user", text);
  prompt.value = "";
  fit();
  reply();
}

/** Makes the field as high as what is written in it; CSS says how high at most. */
function fit() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("input", fit);
$("prompt").addEventListener("keydown", (event) => {
  // While an input method composes (Chinese, for one), Enter takes its proposal and sends nothing.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !$("settings").open) running?.abort();
});
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  log.querySelectorAll("article").forEach((article) => article.remove());
  $("empty").hidden = false;
  $("prompt").focus();
});
$("language").addEventListener("click", () => {
  switchLanguage();
  showModel();
});

readSettings();
writeWords();
showModel();
connect();
$("prompt").focus();
