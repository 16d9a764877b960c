// What is so, in figures: where the stream stands, what it costs, what the next chunk will do.

import { element, write } from "./element.js";
import { t } from "./language.js";
import { bytes, said } from "./words.js";

const factsOf = () => ({
  network: [t("network"), t("images a second that the network makes")],
  decode: [t("decode"), t("images a second that are decoded")],
  total: [t("end to end"), t("images a second that both make together, waits left out")],
  buffer: [t("buffer"), t("seconds of video that this page holds ready")],
  memory: [t("memory"), t("RAM, and the device's")],
  past: [t("past"), t("RAM that the way back takes, of what it may")],
});

const rate = (value) => (value == null ? "–" : `${value.toFixed(value < 100 ? 1 : 0)} fps`);

export class Display {
  constructor(session, player) {
    Object.assign(this, { session, player, cells: {} });
    const list = element("dl", { className: "rf-facts" });
    for (const [name, [label, title]] of Object.entries(factsOf())) {
      this.cells[name] = element("dd", { textContent: "–" });
      list.append(element("div", { title }, element("dt", { textContent: label }), this.cells[name]));
    }
    this.next = element("p", { className: "rf-next" });
    this.element = element("div", { className: "rf-display" }, this.next, list);
  }

  render() {
    const { status } = this.session;
    if (!status) return;
    const { fps, memory } = status;
    const device = memory.device == null ? "" : ` · ${bytes(memory.device)}`;
    const facts = {
      network: rate(fps.network),
      decode: rate(fps.decode),
      total: rate(fps.total),
      memory: bytes(memory.ram) + device,
      past: t("{taken} of {all}", { taken: bytes(status.history_bytes), all: bytes(status.history_limit) }),
    };
    for (const [name, text] of Object.entries(facts)) write(this.cells[name], text);
    this.renderBuffer();
    write(this.next, this.coming(status));
    this.next.title = this.next.textContent;
  }

  renderBuffer() {
    const { image, lead } = this.player;
    write(this.cells.buffer, image ? "–" : `${lead.toFixed(1)} s`);
  }

  coming({ chunk, paused, suspended, coming, ended }) {
    if (ended || this.session.over) return "";
    const due = coming.filter((each) => each.chunk === chunk).map((each) => `“${each.text}”`);
    const waiting = this.session.commands.filter((each) => each.state === "received");
    const all = [...due, ...waiting.map((each) => said(each.command))];
    if (paused && !all.length) return t("Paused.");
    if (suspended && !all.length) return t("Goes on by itself after the other prompt.");
    return t("Next, chunk {chunk}: {what}", { chunk, what: all.join("; ") || t("goes on") });
  }
}
