// The picture of a live session, at the stream's own rate: one chunk behind the newest, two at most.
// Its fragments go to a video element as they come (Media Source Extensions); where a browser cannot
// do that, or not with this codec, a stream of JPEGs takes their place.

import { element } from "./element.js";
import { MarkReader } from "./marks.js";

const MOST_CHUNKS = 2; // behind the newest; further behind, it jumps
const ENOUGH = 0.7; // of a chunk, to play on: a video's first chunk has fewer images than the others
const KEPT = 10; // seconds of the past
const SAME = 0.02; // seconds; browsers round times
const RECENT = 0.5; // seconds that a mark is good for
const WAIT = 1000; // milliseconds before connecting again
const Source = globalThis.ManagedMediaSource ?? globalThis.MediaSource;

const once = (target, name) => new Promise((done) => target.addEventListener(name, done, { once: true }));
const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

export class Player {
  marks = []; // {time, camera, number, captured}: the camera's frame that the image at a time is made of

  constructor(session) {
    this.session = session;
    this.video = element("video", { muted: true, playsInline: true, disableRemotePlayback: true });
    this.video.addEventListener("waiting", () => this.lead < 0.1 && this.video.pause());
    this.element = element("div", { className: "rf-screen" }, this.video);
    this.onVisible = () => this.restart();
    document.addEventListener("visibilitychange", this.onVisible);
    this.run();
  }

  get chunk() {
    return this.session.status?.chunk_seconds ?? 0.75;
  }

  get end() {
    const { buffered } = this.video;
    return buffered.length ? buffered.end(buffered.length - 1) : 0;
  }

  get lead() {
    return Math.max(0, this.end - this.video.currentTime); // seconds
  }

  get stopped() {
    return this.closed || this.session.over;
  }

  close() {
    this.closed = true;
    document.removeEventListener("visibilitychange", this.onVisible);
    this.connection?.abort();
    this.image?.removeAttribute("src");
    this.video.removeAttribute("src");
    this.video.load();
    if (this.address) URL.revokeObjectURL(this.address);
  }

  // A page that nobody sees reads no video.
  restart() {
    this.connection?.abort();
    if (this.image && !this.stopped) this.show(this.image);
  }

  async run() {
    while (!this.stopped && !this.image) {
      if (document.hidden) await once(document, "visibilitychange");
      if (document.hidden || this.stopped) continue;
      try {
        await this.read();
      } catch (error) {
        const lost = error instanceof TypeError || error.name === "AbortError"; // by fetch
        if (!lost && !this.stopped) this.fall();
      }
      await sleep(WAIT);
    }
  }

  async read() {
    this.connection = new AbortController();
    const response = await this.session.fetch("video.mp4", { signal: this.connection.signal });
    if (!response.ok) return;
    await this.open(`video/mp4; codecs="${response.headers.get("X-RF-Codec")}"`);
    const reader = response.body.getReader();
    const marks = new MarkReader(this.buffer.timestampOffset);
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      this.marks.push(...marks.read(value));
      await this.append(value);
      await this.keepUp();
    }
  }

  // Another connection goes on where the one before ended: the last picture stays meanwhile.
  async open(type) {
    if (!Source?.isTypeSupported(type)) throw new Error(`this browser plays no ${type}`);
    if (this.buffer) {
      this.buffer.abort();
      this.buffer.timestampOffset = this.end;
      return;
    }
    const source = new Source();
    this.address = URL.createObjectURL(source);
    this.video.src = this.address;
    await once(source, "sourceopen");
    this.buffer = source.addSourceBuffer(type);
  }

  // One at a time: a browser that cannot keep up reads no more, and the server skips for it.
  async append(bytes) {
    if (this.video.error) throw new Error(this.video.error.message);
    this.buffer.appendBuffer(bytes);
    await once(this.buffer, "updateend");
  }

  async keepUp() {
    const { video, end, chunk, lead } = this;
    if (lead > (MOST_CHUNKS + 0.5) * chunk) video.currentTime = end - chunk;
    if (video.paused && lead >= ENOUGH * chunk) video.play().catch(() => {});
    const past = video.currentTime - KEPT;
    if (!video.buffered.length || video.buffered.start(0) > past - KEPT) return;
    this.buffer.remove(0, past);
    await once(this.buffer, "updateend");
  }

  // The mark of an image that is shown, each once; null where there is none, or it is too long ago.
  markAt(time) {
    const passed = this.marks.filter((mark) => mark.time <= time + SAME);
    this.marks = this.marks.slice(passed.length);
    const mark = passed.at(-1);
    return mark && time - mark.time < RECENT ? mark : null;
  }

  fall() {
    this.image = element("img", { alt: "" });
    this.image.onerror = () => sleep(WAIT).then(() => this.stopped || this.show(this.image));
    this.video.replaceWith(this.image);
    this.show(this.image);
  }

  show(image) {
    if (document.hidden) image.removeAttribute("src");
    else image.src = `${this.session.url("video.mjpeg")}&at=${Date.now()}`;
  }
}
