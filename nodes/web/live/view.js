// A live session on a page: the picture, the strip of time, the panel, the figures. It knows no node.

import { Camera } from "./camera.js";
import { Display } from "./display.js";
import { button, element, write } from "./element.js";
import { t } from "./language.js";
import { Panel } from "./panel.js";
import { Player } from "./player.js";
import { Popover } from "./popover.js";
import { Session } from "./session.js";
import { Strip } from "./strip.js";
import { place } from "./words.js";

const STYLE = new URL("./live.css", import.meta.url).href;
const BUFFER = 500; // milliseconds between two looks at it
const SURE = 3000; // milliseconds that "stop" waits for its second click
const BACK = 4; // chunks that Rewind proposes
const BRANCH = "[A-Za-z0-9][A-Za-z0-9_\\-]{0,39}";

// What happens within the view is meant for it alone: not for the canvas below, nor its keys.
const OWN = ["keydown", "keyup", "keypress", "copy", "cut", "paste", "wheel", "dblclick"];
const DRAGS = ["pointerdown", "pointermove", "pointerup", "mousedown", "mousemove", "mouseup"];

export function loadStyle() {
  if (!document.querySelector(`link[href="${STYLE}"]`))
    document.head.append(element("link", { rel: "stylesheet", href: STYLE }));
}

export class View {
  // address: of the API; watch: the address of this session's own page
  constructor({ address, session, token, watch, onOver }) {
    loadStyle();
    this.watch = watch;
    this.session = new Session(address, session, token);
    this.player = new Player(this.session);
    this.camera = new Camera(this.session, this.player);
    this.panel = new Panel(this.session);
    this.display = new Display(this.session, this.player);
    this.popover = new Popover();
    this.strip = new Strip(this.session, this);
    this.panel.onLater = () => this.schedule();
    this.build();
    this.session.addEventListener("change", () => {
      this.render();
      if (this.session.over) onOver?.(this.session.over);
    });
    this.camera.addEventListener("trouble", ({ detail }) =>
      this.popover.show(detail, {}, t("OK"), () => {}),
    );
    this.timer = setInterval(() => this.display.renderBuffer(), BUFFER);
    this.render();
  }

  build() {
    this.badge = element("span", { className: "rf-badge", role: "status" });
    this.player.element.append(this.badge, this.camera.element, this.popover.element);
    this.player.element.addEventListener("dblclick", () => this.fill());
    this.player.element.title = t("double-click: full screen");
    this.where = element("span", { className: "rf-where" });
    const control = (label, onclick, title, className = "") => button(label, onclick, { title, className });
    const pause = () => this.send({ do: this.session.status?.paused ? "resume" : "pause" });
    const cut = () => this.send({ do: "cut" });
    this.controls = [
      (this.pause = control(t("Pause"), pause, t("nothing is made until it goes on"))),
      control(t("Cut"), cut, t("everything starts afresh with the next chunk")),
      control(t("Rewind…"), () => this.rewind(), t("go back and take another way from there")),
      (this.link = control(t("Link"), () => this.copyLink(), t("copy a link to watch and steer it elsewhere"))),
      (this.stop = control(t("Stop"), () => this.askStop(), t("end it and keep what is made"), "rf-stop")),
    ];
    const gap = element("span", { className: "rf-gap" });
    const bar = element("div", { className: "rf-bar" }, this.where, gap, ...this.controls);
    const watched = element("div", { className: "rf-watch" }, this.player.element, bar, this.strip.element);
    const steered = element("div", { className: "rf-steer" }, this.panel.element, this.display.element);
    this.body = element("div", { className: "rf-body" }, watched, steered);
    this.element = element("div", { className: "rf-live", tabIndex: -1 }, this.body);
    const stop = (event) => event.stopPropagation();
    for (const name of OWN) this.element.addEventListener(name, stop);
    for (const name of DRAGS)
      this.element.addEventListener(name, (event) => event.button === 1 || stop(event)); // that pans
    this.element.addEventListener("keydown", (event) => this.key(event));
  }

  fill() {
    if (document.fullscreenElement) document.exitFullscreen();
    else if (this.popover.element.hidden) this.player.element.requestFullscreen?.();
  }

  close() {
    clearInterval(this.timer);
    this.camera.close();
    this.session.close();
    this.player.close();
    this.element.remove();
  }

  send(command) {
    return this.session.send(command);
  }

  // 1 to 9 play a slot; with shift they keep the prompt box in it.
  key({ code, shiftKey, ctrlKey, metaKey, altKey, target }) {
    const digit = code.match(/^(?:Digit|Numpad)([1-9])$/)?.[1];
    const writes = target.matches("textarea, select, input:not([type=range])");
    if (digit && !writes && !ctrlKey && !metaKey && !altKey) this.panel.slot(digit - 1, shiftKey);
  }

  // A show is not ended by one click beside the mark.
  askStop() {
    const sure = this.stop.classList.contains("rf-sure");
    this.calm();
    if (sure) return this.send({ do: "stop" });
    this.stop.classList.add("rf-sure");
    write(this.stop, t("Stop?"));
    this.doubt = setTimeout(() => this.calm(), SURE);
  }

  calm() {
    clearTimeout(this.doubt);
    this.stop.classList.remove("rf-sure");
    write(this.stop, t("Stop"));
  }

  async copyLink() {
    const copied = navigator.clipboard?.writeText(this.watch);
    const said = await copied?.then(() => t("Copied")).catch(() => null);
    if (!said) return this.showLink(); // a page without https may not write to the clipboard
    write(this.link, said);
    setTimeout(() => write(this.link, t("Link")), SURE);
  }

  showLink() {
    const field = element("input", { value: this.watch, readOnly: true });
    this.popover.show(t("Watch link"), { link: [t("address"), field] }, t("Done"), () => {});
    field.select();
  }

  rewind(chunk) {
    const { status } = this.session;
    if (!status) return;
    if (status.oldest == null)
      return this.popover.show(t("Nothing is kept to go back to."), {}, t("OK"), () => {});
    const [min, max] = [status.oldest, status.chunk];
    const value = Math.min(max, Math.max(min, chunk ?? max - BACK));
    const about = {
      placeholder: t("a name, if you like"),
      pattern: BRANCH,
      title: t("1 to 40 letters, digits, - and _"),
    };
    const fields = {
      chunk: [t("to chunk"), element("input", { type: "number", min, max, value, required: true })],
      branch: [t("new branch"), element("input", about)],
    };
    const title = this.retitle(fields.chunk[1], (at) => t("Rewind to {place}", { place: place(at, status) }));
    this.popover.show(title, fields, t("Rewind"), ({ chunk: to, branch }) =>
      this.send({ do: "rewind", chunk: Number(to), ...(branch && { branch }) }),
    );
  }

  schedule(chunk) {
    const { status } = this.session;
    if (!status) return;
    const min = status.chunk + 1;
    const value = Math.max(min, chunk ?? min + BACK);
    const text = this.panel.text.value || status.prompt;
    const fields = {
      chunk: [t("at chunk"), element("input", { type: "number", min, value, required: true })],
      text: [t("prompt"), element("textarea", { rows: 2, value: text, required: true })],
    };
    const title = this.retitle(fields.chunk[1], (at) =>
      t("{mode} at {place}", { mode: this.panel.switch, place: place(at, status) }),
    );
    this.popover.show(title, fields, t("Schedule"), ({ chunk: at, text: prompt }) =>
      this.send({ do: "schedule", chunk: Number(at), text: prompt, mode: this.panel.switch }),
    );
  }

  retitle(field, title) {
    field.oninput = () => write(this.popover.element.firstChild, title(Number(field.value)));
    return title(Number(field.value));
  }

  state({ paused, suspended, branch }) {
    const { status, over, connected, trouble } = this.session;
    if (over) return ["over", over.why ?? t("Ended")];
    if (!connected) return ["lost", trouble ?? (status ? t("Connecting again…") : t("Connecting…"))];
    if (suspended) return ["paused", t("Another prompt runs")];
    const on = paused ? t("Paused") : t("Live");
    return [paused ? "paused" : "on", branch.parent ? `${on} · ${branch.name}` : on];
  }

  render() {
    const { status, over } = this.session;
    const { paused, chunk, width, height } = status ?? {};
    const [kind, text] = this.state(status ?? {});
    write(this.badge, text);
    this.badge.dataset.kind = kind;
    if (status) {
      this.player.element.style.aspectRatio = `${width} / ${height}`;
      write(this.where, place(chunk, status));
      write(this.pause, paused ? t("Resume") : t("Pause"));
    }
    for (const each of this.controls) each.disabled = Boolean(over);
    if (over) this.popover.element.hidden = true;
    this.element.classList.toggle("rf-none", !status);
    if (over) this.camera.close();
    this.camera.render();
    this.panel.render();
    this.display.render();
    this.strip.render();
  }
}
