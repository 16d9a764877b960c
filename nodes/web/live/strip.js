// The strip of time: prompts that were, as coloured spans, branches where they leave, where the stream
// stands, and what is to come. A click on the past asks to go back there, one on the future for a
// prompt there; a coming change is dragged, or dropped.

import { button, element, write } from "./element.js";
import { t } from "./language.js";
import { place, said, seconds } from "./words.js";

const LEAST = 32; // chunks that are shown at once
const MOST = 8192;
const PAST = 0.66; // of the strip
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600]; // seconds between marks of time
const MARKS = 7; // at most
const SHOWN = 12; // branches
const [ROWS, ROW] = [3, 4]; // of lines under the track; pixels of each

const GOLDEN = 137.5; // degrees: prompts that follow one another differ most
const seen = new Map();

function colour(text) {
  if (!seen.has(text)) seen.set(text, seen.size);
  return `hsl(${Math.round(205 + GOLDEN * seen.get(text)) % 360} 38% 34%)`;
}

export class Strip {
  constructor(session, asks) {
    Object.assign(this, { session, asks, span: LEAST, pills: new Map() });
    this.times = element("div", { className: "rf-times" });
    this.spans = element("div", { className: "rf-spans" });
    this.over = element("div", { className: "rf-pills" });
    this.ghost = element("div", { className: "rf-ghost", hidden: true });
    this.now = element("div", { className: "rf-now" });
    const onTrack = [this.spans, this.over, this.now, this.ghost];
    this.track = element("div", { className: "rf-track" }, ...onTrack);
    this.lines = element("div", { className: "rf-lines" });
    this.branches = element("div", { className: "rf-branches" });
    this.later = button("", () => this.zoom(2), { className: "rf-later", hidden: true });
    const zoom = (label, factor, title) =>
      button(label, () => this.zoom(factor), { title, "aria-label": title });
    const both = [zoom("−", 2, t("show more time")), zoom("+", 1 / 2, t("show less time"))];
    const zooms = element("div", { className: "rf-zoom" }, ...both);
    const parts = [this.times, this.track, this.lines, this.branches, zooms, this.later];
    const group = { className: "rf-strip", role: "group", "aria-label": t("strip of time") };
    this.element = element("div", group, ...parts);
    this.track.addEventListener("pointermove", (event) => this.point(event));
    this.track.addEventListener("pointerleave", () => (this.ghost.hidden = true));
    this.track.addEventListener("click", (event) => this.click(event));
  }

  get status() {
    return this.session.status;
  }

  get left() {
    return Math.max(0, Math.ceil(this.status.chunk - PAST * this.span));
  }

  at(chunk) {
    return `${(100 * (chunk - this.left)) / this.span}%`;
  }

  chunkAt({ clientX }) {
    const { left, width } = this.track.getBoundingClientRect();
    return Math.floor(this.left + ((clientX - left) / width) * this.span);
  }

  zoom(factor) {
    this.span = Math.min(MOST, Math.max(LEAST, this.span * factor));
    this.render();
  }

  point(event) {
    if (!this.status || this.dragged) return;
    const chunk = this.chunkAt(event);
    this.ghost.hidden = false;
    this.ghost.style.left = this.at(chunk);
    this.ghost.classList.toggle("rf-left", (chunk - this.left) / this.span > 0.6);
    const sign = chunk < this.status.chunk ? "←" : "+";
    this.ghost.dataset.at = `${sign} ${place(chunk, this.status)}`;
  }

  click(event) {
    if (!this.status || event.target.closest(".rf-pill")) return;
    const chunk = this.chunkAt(event);
    if (chunk < this.status.chunk) this.asks.rewind(chunk);
    else this.asks.schedule(Math.max(chunk, this.status.chunk + 1));
  }

  render() {
    if (!this.status || this.dragged) return;
    this.renderTimes();
    this.renderSpans();
    this.renderLines();
    this.renderBranches();
    this.renderComing();
    this.now.style.left = this.at(this.status.chunk);
  }

  renderTimes() {
    const { chunk_seconds } = this.status;
    const [first, length] = [this.left * chunk_seconds, this.span * chunk_seconds];
    const step = STEPS.find((each) => length / each <= MARKS) ?? STEPS.at(-1);
    const marks = [];
    for (let time = Math.ceil(first / step) * step; time < first + length; time += step) {
      const textContent = time < 60 ? `${time} s` : seconds(time).replace(/\.0$/, "");
      const mark = element("span", { textContent });
      mark.style.left = this.at(time / chunk_seconds);
      marks.push(mark);
    }
    this.times.replaceChildren(...marks);
  }

  box(from, to, about) {
    const right = this.left + this.span;
    const [start, end] = [Math.max(from, this.left), Math.min(to, right)];
    if (end <= start) return [];
    const made = element("span", about);
    made.style.left = this.at(start);
    made.style.width = `${(100 * (end - start)) / this.span}%`;
    return [made];
  }

  renderSpans() {
    const { coming, oldest, until, chunk } = this.status;
    const gone = { className: "rf-gone", title: t("too long ago to go back to") };
    const ends = until && t("ends at {place}", { place: place(until, this.status) });
    const after = { className: "rf-after", title: ends };
    this.spans.replaceChildren(
      ...this.ahead(coming, until ?? Infinity),
      ...this.behind(),
      ...this.box(0, oldest ?? chunk, gone),
      ...this.ticks(),
      ...this.box(until ?? Infinity, Infinity, after),
    );
  }

  behind() {
    const prompts = this.status.past.filter((each) => each.text != null);
    return prompts.flatMap(({ chunk, text, mode }, i) => {
      const to = prompts[i + 1]?.chunk ?? this.status.chunk;
      const title = `${place(chunk, this.status)}${mode ? ` · ${mode}` : ""}\n${text}`;
      const boxes = this.box(chunk, to, { className: "rf-span", textContent: text, title });
      for (const each of boxes) each.style.background = colour(text);
      return boxes;
    });
  }

  ahead(coming, end) {
    const now = { text: this.status.prompt, chunk: this.status.chunk };
    return [now, ...coming].flatMap(({ text, chunk }, i) => {
      const boxes = this.box(chunk, Math.min(end, coming[i]?.chunk ?? Infinity), { className: "rf-ahead" });
      for (const each of boxes) each.style.setProperty("--rf-span", colour(text));
      return boxes;
    });
  }

  ticks() {
    const changes = this.status.past.filter((each) => each.do !== "prompt");
    return changes.flatMap((each) => {
      const title = `${place(each.chunk, this.status)}\n${said(each)}`;
      return this.box(each.chunk, each.chunk + 1, { className: "rf-tick", title });
    });
  }

  // The ways that were left, in some rows: each from where it began to where it was left.
  renderLines() {
    const left = this.status.branches.filter(({ ended }) => ended != null);
    const lines = left.slice(-SHOWN).flatMap(({ name, begins, ended, file }, i) => {
      const to = t("{name}, to {place}", { name, place: place(ended, this.status) });
      const title = `${to}\n${file ?? ""}`;
      const boxes = this.box(begins, ended, { className: "rf-line", title });
      for (const each of boxes) each.style.top = `${ROW * (i % ROWS)}px`;
      return boxes;
    });
    this.lines.style.height = `${ROW * Math.min(ROWS, left.length)}px`;
    this.lines.replaceChildren(...lines);
  }

  renderBranches() {
    const { branches, branch } = this.status;
    const right = this.left + this.span;
    const left = branches.filter((each) => each.parent); // a line that it left
    const shown = left.filter(({ begins }) => begins >= this.left && begins < right);
    const flags = shown.slice(-SHOWN).map(({ name, parent, begins, file }) => {
      const at = place(begins, this.status);
      const title = `${t("{name} leaves {parent} at {place}", { name, parent, place: at })}\n${file ?? ""}`;
      const flag = element("span", { className: "rf-flag", textContent: name, title });
      flag.classList.toggle("rf-here", name === branch.name);
      flag.classList.toggle("rf-left", (begins - this.left) / this.span > 0.6);
      flag.style.left = this.at(begins);
      return flag;
    });
    this.branches.replaceChildren(...flags);
  }

  renderComing() {
    const { coming } = this.status;
    const numbers = new Set(coming.map((each) => each.number));
    for (const [number, pill] of this.pills)
      if (!numbers.has(number)) {
        pill.remove();
        this.pills.delete(number);
      }
    for (const change of coming) {
      const pill = this.pills.get(change.number) ?? this.pill(change.number);
      Object.assign(pill, { change, hidden: change.chunk >= this.left + this.span });
      pill.style.left = this.at(change.chunk);
      const at = place(change.chunk, this.status);
      const help = t("drag or arrow keys: another time; double-click or Delete: drop");
      pill.title = `${at} · ${change.mode}\n${change.text}\n(${help})`;
      pill.setAttribute("aria-label", t("{text}, coming at {place}", { text: change.text, place: at }));
      write(pill.firstChild, change.text);
    }
    const hidden = coming.filter((each) => each.chunk >= this.left + this.span).length;
    this.later.hidden = !hidden;
    write(this.later, t("{count} later ›", { count: hidden }));
  }

  pill(number) {
    const cross = button("×", () => this.drop(number), { className: "rf-drop", title: t("drop it") });
    const about = { className: "rf-pill", tabIndex: 0, role: "group" };
    const pill = element("div", about, element("span"), cross);
    pill.addEventListener("pointerdown", (event) => event.target !== cross && this.grab(pill, event));
    pill.addEventListener("dblclick", () => this.drop(number));
    pill.addEventListener("keydown", ({ key }) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
      if (step) this.move(pill.change, pill.change.chunk + step);
      if (key === "Delete" || key === "Backspace") this.drop(number);
    });
    this.pills.set(number, pill);
    this.over.append(pill);
    return pill;
  }

  grab(pill, event) {
    if (event.button !== 0) return;
    const { number, chunk } = pill.change;
    const begun = this.chunkAt(event);
    let to = chunk;
    this.dragged = number;
    this.ghost.hidden = true;
    pill.setPointerCapture(event.pointerId);
    const follow = (moved) => {
      to = Math.max(this.status.chunk + 1, chunk + this.chunkAt(moved) - begun);
      pill.style.left = this.at(to);
      pill.dataset.at = to === chunk ? "" : place(to, this.status);
    };
    const release = () => {
      pill.removeEventListener("pointermove", follow);
      pill.dataset.at = "";
      this.dragged = null;
      if (to !== chunk) this.move(pill.change, to);
    };
    pill.addEventListener("pointermove", follow);
    pill.addEventListener("lostpointercapture", release, { once: true });
  }

  move({ number }, chunk) {
    if (chunk > this.status.chunk) this.session.send({ do: "move", change: number, chunk });
  }

  drop(number) {
    this.session.send({ do: "drop", change: number });
  }
}
