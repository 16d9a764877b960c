// The view's words in the reader's language: English ones are the keys, and stand where there is no other.

import { ZH } from "./words_zh.js";

const TABLES = { zh: ZH };
let table = {};

// A locale as browsers and ComfyUI name it: zh, zh-CN.
export function speak(locale) {
  table = TABLES[locale?.split("-")[0]] ?? {};
}

export const t = (english, values = {}) =>
  (table[english] ?? english).replace(/\{(\w+)\}/g, (_, name) => values[name]);
