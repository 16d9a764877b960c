// What is asked of a live stream: a prompt and how it goes over, nine slots on the keys 1 to 9,
// sliders, and what became of it.

import { button, element, write } from "./element.js";
import { t } from "./language.js";
import { answered, said } from "./words.js";

const MODES = ["recache", "soft", "blend", "cut"];
const SLOTS = "rf.live.slots";
const SHOWN = 3; // commands
const LORA = { min: -1, max: 2, step: 0.05 };
const DECAY = { min: 0, max: 1, step: 0.001 };
const STRENGTH = { min: 0, max: 1, step: 0.05 };

const open = ({ state }) => state === "sent" || state === "received";

function readSlots() {
  try {
    const kept = JSON.parse(localStorage.getItem(SLOTS) ?? "[]");
    return Array.from({ length: 9 }, (_, i) => String(kept[i] ?? ""));
  } catch {
    return Array(9).fill("");
  }
}

// A value that follows the stream, except where a hand is on it or its last change is on its way.
class Slider {
  constructor(label, bounds, send, valueOf) {
    this.valueOf = valueOf;
    this.output = element("output");
    this.told = element("span", { className: "rf-told" });
    this.input = element("input", { type: "range", ...bounds, "aria-label": label });
    this.input.oninput = () => {
      this.held = true;
      this.write(Number(this.input.value));
    };
    this.input.onchange = () => {
      this.held = false;
      send(Number(this.input.value));
    };
    const name = element("label", { textContent: label, title: label });
    this.element = element("div", { className: "rf-slider" }, name, this.input, this.output, this.told);
  }

  write(value) {
    write(this.output, value.toFixed(this.input.step < 0.01 ? 3 : 2));
  }

  render(value, command) {
    if (this.held || (command && open(command))) return write(this.told, command ? t("waits") : "");
    if (value < this.input.min) this.input.min = value;
    if (value > this.input.max) this.input.max = value;
    this.input.value = value;
    this.write(value);
    const gone = command?.state === "applied" && this.valueOf(command.command) !== value; // by a rewind
    write(this.told, command && !gone ? answered(command) : "");
    this.told.title = this.told.textContent;
  }
}

export class Panel {
  constructor(session) {
    this.session = session;
    this.sliders = new Map();
    this.slots = readSlots();
    this.text = element("textarea", {
      className: "rf-text",
      rows: 2,
      placeholder: t("Another prompt; Ctrl-Enter applies it at the next chunk"),
      "aria-label": t("prompt"),
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.apply();
    });
    const help = t(
      "recache: the picture follows at once, motion goes on. soft: it drifts over. blend: over some chunks. cut: everything starts afresh.",
    );
    this.mode = element("select", { title: help, "aria-label": t("mode") });
    this.mode.append(...MODES.map((name) => new Option(name)));
    this.length = element("input", {
      type: "number",
      min: 1,
      max: 99,
      value: 3,
      title: t("chunks that the blend takes"),
      "aria-label": t("blend length in chunks"),
    });
    this.mode.onchange = () => (this.length.disabled = this.mode.value !== "blend");
    this.mode.onchange();
    const how = element(
      "div",
      { className: "rf-row" },
      this.mode,
      this.length,
      element("span", { className: "rf-unit", textContent: t("chunks") }),
      element("span", { className: "rf-gap" }),
      button(t("Later…"), () => this.onLater(), { title: t("schedule it for a later chunk") }),
      button(t("Apply"), () => this.apply(), { className: "rf-main", title: "Ctrl-Enter" }),
    );
    this.keys = this.slots.map((_, i) =>
      button("", (event) => this.slot(i, event.shiftKey), { className: "rf-slot" }),
    );
    const group = { className: "rf-slots", role: "group", "aria-label": t("prompt slots") };
    const slots = element("div", group, ...this.keys);
    this.values = element("div", { className: "rf-sliders" });
    const rows = Array.from({ length: SHOWN }, () =>
      element("li", {}, element("span"), element("span")),
    );
    const list = { className: "rf-log", "aria-live": "polite", "aria-label": t("commands") };
    this.log = element("ol", list, ...rows);
    const parts = [this.text, how, slots, this.values, this.log];
    this.element = element("div", { className: "rf-panel" }, ...parts);
    this.renderSlots();
  }

  get switch() {
    if (this.mode.value !== "blend") return this.mode.value;
    return `blend ${Math.max(1, Math.round(this.length.value) || 1)}`;
  }

  send(command) {
    return this.session.send(command);
  }

  apply(text = this.text.value) {
    if (text.trim()) this.send({ do: "prompt", text, mode: this.switch });
  }

  // Plays a slot; keeps the prompt box in it where shift is held, or it is empty.
  slot(index, keeps) {
    if (!keeps && this.slots[index]) return this.apply(this.slots[index]);
    this.slots[index] = this.text.value.trim();
    localStorage.setItem(SLOTS, JSON.stringify(this.slots));
    this.renderSlots();
  }

  renderSlots() {
    this.keys.forEach((key, i) => {
      const text = this.slots[i];
      const number = element("kbd", { textContent: i + 1 });
      key.replaceChildren(number, element("span", { textContent: text || t("empty") }));
      key.classList.toggle("rf-empty", !text);
      const help = t("keeps what stands in the prompt box");
      key.title = text ? `${text}\n${t("(with Shift: {help})", { help })}` : help;
    });
  }

  follow(key, label, value, bounds, like, name) {
    if (!this.sliders.has(key)) {
      const send = (value) => this.send({ ...like, [name]: value });
      const made = new Slider(label, bounds, send, (command) => command[name]);
      this.sliders.set(key, made);
      this.values.append(made.element);
    }
    const same = ({ command }) => command.do === like.do && command.name === like.name;
    this.sliders.get(key).render(value, this.session.commands.findLast(same));
  }

  render() {
    const { status, commands, over } = this.session;
    for (const [name, strength] of Object.entries(status?.loras ?? {})) {
      const label = name.replace(/\.safetensors$/, "");
      this.follow(`lora ${name}`, label, strength, LORA, { do: "lora", name }, "strength");
    }
    if (status?.strength != null) {
      const like = { do: "strength" };
      this.follow("strength", t("source strength"), status.strength, STRENGTH, like, "strength");
    }
    if (status) this.follow("decay", t("sink decay"), status.decay, DECAY, { do: "decay" }, "decay");
    const shown = commands.slice(-SHOWN);
    [...this.log.children].forEach((row, i) => {
      const entry = shown[i];
      const number = entry?.number ? `#${entry.number} ` : "";
      write(row.children[0], entry ? number + said(entry.command) : "");
      write(row.children[1], entry ? answered(entry) : "");
      row.className = entry ? `rf-${entry.state}` : "";
      row.title = entry ? `${said(entry.command)}\n${answered(entry)}` : "";
    });
    for (const each of this.element.querySelectorAll("button, input, select, textarea"))
      if (each !== this.length) each.disabled = Boolean(over);
  }
}
