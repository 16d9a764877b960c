// What is so, in figures: where the stream stands, what it costs, what the next chunk will do.

import { element, write } from "./element.js";
import { bytes, said } from "./words.js";

const FACTS = {
  network: "images a second that the network makes",
  decode: "images a second that are decoded",
  "end to end": "images a second that come out, as it is paced",
  buffer: "seconds of video that this page holds ready",
  memory: "RAM, and the device's",
  past: "RAM that the way back takes, of what it may",
};

const rate = (value) => (value == null ? "–" : `${value.toFixed(value < 100 ? 1 : 0)} fps`);

export class Display {
  constructor(session, player) {
    Object.assign(this, { session, player, cells: {} });
    const list = element("dl", { className: "rf-facts" });
    for (const [name, title] of Object.entries(FACTS)) {
      this.cells[name] = element("dd", { textContent: "–" });
      list.append(element("div", { title }, element("dt", { textContent: name }), this.cells[name]));
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
      "end to end": rate(fps.total),
      memory: bytes(memory.ram) + device,
      past: `${bytes(status.history_bytes)} of ${bytes(status.history_limit)}`,
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

  coming({ chunk, paused, coming, ended }) {
    if (ended || this.session.over) return "";
    const due = coming.filter((each) => each.chunk === chunk).map((each) => `“${each.text}”`);
    const waiting = this.session.commands.filter((each) => each.state === "received");
    const all = [...due, ...waiting.map((each) => said(each.command))];
    if (paused && !all.length) return "Paused.";
    return `Next, chunk ${chunk}: ${all.join("; ") || "goes on"}`;
  }
}
