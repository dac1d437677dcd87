// What the page says, in both languages. Errors come from the server, as it words them.

const WORDS = {
  en: {
    other: "中文",
    newChat: "New chat",
    settings: "Settings",
    message: "Message",
    send: "Send",
    stop: "Stop",
    copy: "Copy",
    copied: "Copied",
    retry: "Try again",
    you: "You",
    emptyChat: "Ask something. Enter sends, Shift+Enter begins a new line.",
    emptyText: "This model has no chat template: it goes on with the text that you write.",
    key: "API key",
    keyHint: "Needed only where the server asks for one. Kept until this tab is closed.",
    system: "System prompt",
    temperature: "Temperature",
    asModel: "model’s own",
    maxTokens: "Token limit",
    theme: "Theme",
    auto: "System",
    light: "Light",
    dark: "Dark",
    done: "Done",
    stopped: "stopped",
    length: "cut at the limit of tokens",
    content_filter: "ended by a content filter",
    deadline: "out of time",
    unreachable: "The server can’t be reached.",
    broken: "The answer broke off.",
    numbers: (tokens, rate, first) =>
      `${tokens} token${tokens === 1 ? "" : "s"} · ${rate} tokens/s · first after ${first} ms`,
  },
  zh: {
    other: "English",
    newChat: "新对话",
    settings: "设置",
    message: "输入消息",
    send: "发送",
    stop: "停止",
    copy: "复制",
    copied: "已复制",
    retry: "重试",
    you: "你",
    emptyChat: "请输入问题。按 Enter 发送，Shift+Enter 换行。",
    emptyText: "该模型没有对话模板：它会接着你写的文字续写。",
    key: "API 密钥",
    keyHint: "仅在服务器要求时填写；关闭此标签页后即清除。",
    system: "系统提示词",
    temperature: "温度",
    asModel: "模型默认",
    maxTokens: "词元上限",
    theme: "主题",
    auto: "跟随系统",
    light: "浅色",
    dark: "深色",
    done: "完成",
    stopped: "已停止",
    length: "达到词元上限",
    content_filter: "被内容过滤器终止",
    deadline: "超时",
    unreachable: "无法连接服务器。",
    broken: "回答中断了。",
    numbers: (tokens, rate, first) => `${tokens} 个词元 · ${rate} 词元/秒 · 首个用时 ${first} 毫秒`,
  },
};

let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
if (!(language in WORDS)) language = "en";

/** A word, or a function that makes a sentence, in the page's language. */
export const word = (name) => WORDS[language][name];

/** Switches to the other language and writes every word of the page again. */
export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  localStorage.setItem("language", language);
  writeWords();
}

/** Fills in what the page's elements ask for in `data-word` and `data-placeholder`. */
export function writeWords() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = word(element.dataset.word);
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    element.placeholder = word(element.dataset.placeholder);
  }
}
