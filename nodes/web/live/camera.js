// This browser's camera, for a live session to look through. Images go one at a time, each the newest
// there is: while one is on its way, those that pass are not kept. Its button stands on the picture, and
// says how things are; whoever shows it listens for "trouble", which has a sentence.

import { button, element, write } from "./element.js";
import { t } from "./language.js";
import { sentenceOf } from "./session.js";

const QUALITY = 0.85; // of a JPEG
const POLL = 15; // milliseconds between two looks, where a browser does not tell of images
const EARLY = 0.25; // of the time between two images, that one may come before it is due
const PATIENCE = 5000; // milliseconds for an answer
const WAIT = 1000; // milliseconds before another try
const SMOOTH = 0.3; // weight of the newest delay
const BUSY = 429;

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const newName = () =>
  [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

const REASONS = {
  NotAllowedError: () =>
    t("The camera is not allowed. Allow it beside the address, and in the system's settings; then turn it on again."),
  NotFoundError: () => t("No camera was found. Plug one in, then turn it on again."),
  NotReadableError: () => t("The camera is used by another program. Close that, then turn it on again."),
};
const needsHttps = () =>
  t("Browsers give a camera to pages at https or localhost alone. Open ComfyUI at such an address.");

export class Camera extends EventTarget {
  state = "off"; // asking, on
  delay = null; // seconds from the camera to the picture

  constructor(session, player) {
    super();
    Object.assign(this, { session, player });
    this.video = element("video", { muted: true, playsInline: true, disableRemotePlayback: true });
    this.button = button(t("Camera"), () => this.toggle());
    this.element = element("div", { className: "rf-eye" }, this.button);
    this.element.addEventListener("dblclick", (event) => event.stopPropagation());
    this.followPlayer();
  }

  // What the session looks through: its state (off, on or lost), and its name.
  get seen() {
    return this.session.status?.camera ?? null;
  }

  // Whether another page's camera is looked through, as far as is known.
  get foreign() {
    const { state = "off", name } = this.seen ?? {};
    return state !== "off" && ![this.name, this.gone].includes(name);
  }

  toggle() {
    return this.state === "off" ? this.on() : this.off();
  }

  async on() {
    const turn = (this.turn = {});
    this.become("asking");
    let stream;
    try {
      stream = await this.open();
    } catch (error) {
      if (this.turn === turn) this.end(REASONS[error.name]?.() ?? error.message);
      return;
    }
    if (this.turn !== turn) return stream.getTracks().forEach((track) => track.stop());
    this.stream = stream;
    this.name = newName();
    this.delay = null;
    for (const track of stream.getTracks()) track.onended = () => this.end(REASONS.NotFoundError());
    this.video.srcObject = stream;
    this.element.append(this.video);
    this.become("on");
    this.video.play().catch(() => {});
    await this.send(turn);
  }

  open() {
    if (!navigator.mediaDevices?.getUserMedia) throw new Error(needsHttps());
    const { width, height, rate } = this.session.status;
    const video = { width: { ideal: width }, height: { ideal: height }, frameRate: { ideal: rate } };
    return navigator.mediaDevices.getUserMedia({ video, audio: false });
  }

  off() {
    this.gone = this.name;
    if (this.state === "on") this.release(this.name);
    this.end();
  }

  release(name) {
    this.session.fetch(`camera?camera=${name}`, { method: "DELETE", keepalive: true }).catch(() => {});
  }

  // Where it goes off by itself, `why` says so, and what it showed last is held.
  end(why = null) {
    this.turn = null;
    this.stream?.getTracks().forEach((track) => {
      track.onended = null;
      track.stop();
    });
    this.stream = this.video.srcObject = null;
    this.video.remove();
    this.become("off");
    if (why) this.dispatchEvent(new CustomEvent("trouble", { detail: why }));
  }

  become(state) {
    this.state = state;
    this.render();
  }

  async send(turn) {
    const { name } = this;
    const canvas = element("canvas");
    const period = 1000 / this.session.status.rate;
    for (let frame = 1, due = performance.now(); this.turn === turn; ) {
      const captured = performance.timeOrigin + (await this.next(due - EARLY * period));
      if (this.turn !== turn) return;
      due = Math.max(due + period, performance.now() - period);
      const body = await this.draw(canvas);
      const path = `camera?camera=${name}&frame=${frame}&captured=${captured.toFixed(1)}`;
      try {
        const signal = AbortSignal.timeout(PATIENCE);
        const response = await this.session.fetch(path, { method: "POST", body, signal });
        if (this.turn !== turn && this.gone === name) return this.release(name); // it came after that
        if (response.ok) frame += 1;
        else if (response.status !== BUSY) {
          const why = await sentenceOf(response);
          if (this.turn === turn) this.end(why);
        }
      } catch {
        frame += frame > 1; // it may have come
        await sleep(WAIT);
      }
    }
  }

  // When the next image to be sent was captured.
  next(due) {
    return new Promise((done) => {
      const look = (now, { captureTime } = {}) => (now < due ? ask() : done(captureTime ?? now));
      const ask = () =>
        this.video.requestVideoFrameCallback?.(look) ?? setTimeout(() => look(performance.now()), POLL);
      ask();
    });
  }

  // The middle of the image, in the stream's shape, and no larger than it.
  draw(canvas) {
    const { width, height } = this.session.status;
    const { videoWidth, videoHeight } = this.video;
    const scale = Math.min(videoWidth / width, videoHeight / height);
    const [w, h] = [width * scale, height * scale];
    canvas.width = Math.max(1, Math.round(Math.min(width, w)));
    canvas.height = Math.max(1, Math.round(Math.min(height, h)));
    const from = [(videoWidth - w) / 2, (videoHeight - h) / 2, w, h];
    canvas.getContext("2d").drawImage(this.video, ...from, 0, 0, canvas.width, canvas.height);
    return new Promise((done) => canvas.toBlob(done, "image/jpeg", QUALITY));
  }

  // How long after it was captured an image is shown, by this page's own clock.
  followPlayer() {
    const { video } = this.player;
    const look = (now, { mediaTime, expectedDisplayTime }) => {
      const mark = this.player.markAt(mediaTime);
      if (mark && this.state === "on" && mark.camera === this.name) {
        const shown = performance.timeOrigin + expectedDisplayTime - 1000 * (mediaTime - mark.time);
        const delay = (shown - mark.captured) / 1000;
        this.delay = this.delay === null ? delay : (1 - SMOOTH) * this.delay + SMOOTH * delay;
        this.render();
      }
      video.requestVideoFrameCallback(look);
    };
    video.requestVideoFrameCallback?.(look);
  }

  words() {
    const lost = this.seen?.state === "lost" && this.seen.name !== this.gone;
    if (this.state === "asking") return t("camera: allow it");
    if (lost) return t("camera lost: its last image is held");
    if (this.foreign) return this.state === "on" ? t("camera begins") : t("another page's camera");
    if (this.state === "off") return t("Camera");
    if (this.delay === null) return this.seen?.name === this.name ? t("camera on") : t("camera begins");
    return t("camera {seconds} s", { seconds: this.delay.toFixed(1) });
  }

  help() {
    if (this.state === "on")
      return t("seconds from this camera to the picture; a click turns it off: the source, or the prompt alone, goes on");
    return t("guides what is made by this browser's camera, in place of the source or another page's camera; the strength says how far the prompt may leave it; its images are kept beside the video, for replay");
  }

  render() {
    this.element.hidden = !this.seen || Boolean(this.session.over);
    this.element.dataset.kind = this.seen?.state ?? "off";
    write(this.button, this.words());
    this.button.title = this.help();
    this.button.setAttribute("aria-pressed", this.state === "on");
  }

  close() {
    if (this.state !== "off") this.end();
  }
}
