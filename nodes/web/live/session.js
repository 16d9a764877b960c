// A live session as a browser has it: its status, and commands that are followed to their end. It
// connects again by itself, and after a gap goes by the status. It knows no element; whoever shows it
// listens for "change".

import { t } from "./language.js";

const FIRST_WAIT = 500; // milliseconds before connecting again, doubled each time
const LONGEST_WAIT = 8000;
const SILENCE = 40_000; // milliseconds without a sign of life: the server gives one every 15 s
const REMEMBERED = 100; // commands
const REFUSED = new Set([403, 404]); // no later try fares better

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

async function* eventsOf(body, alive) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    alive();
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = block.split("\n").map((line) => line.match(/^(\w+): ?(.*)/)?.slice(1) ?? []);
      const { event, data } = Object.fromEntries(fields);
      if (event && data) yield [event, JSON.parse(data)];
    }
  }
}

export async function sentenceOf(response) {
  const answer = await response.json().catch(() => ({}));
  const status = `${response.status} ${response.statusText}`;
  return answer.error ?? t("the server answered {status}", { status });
}

export class Session extends EventTarget {
  status = null;
  commands = []; // {number, command, own, state, chunk, why}, the oldest first
  connected = false;
  trouble = null; // why it is not connected, where the server says so
  over = null; // {chunk, why} once it has ended, or cannot be reached with this token

  constructor(address, id, token) {
    super();
    Object.assign(this, { id, token, address: `${address}/rf/live/${id}` });
    this.run();
  }

  url(path) {
    return `${this.address}/${path}?token=${encodeURIComponent(this.token)}`; // for what sends no header
  }

  fetch(path, options = {}) {
    const headers = { ...options.headers, Authorization: `Bearer ${this.token}` };
    return fetch(`${this.address}/${path}`, { ...options, headers, cache: "no-store" });
  }

  // sent, then received (it has a number), then applied (from a chunk on) or refused (and why)
  async send(command) {
    const sent = this.remember({ command, own: true, state: "sent" });
    const given = { method: "POST", body: JSON.stringify(command) };
    given.headers = { "Content-Type": "application/json" };
    try {
      const response = await this.fetch("commands", given);
      if (!response.ok) throw new Error(await sentenceOf(response));
      this.number(sent, (await response.json()).number);
    } catch (error) {
      Object.assign(sent, { state: "refused", why: error.message });
    }
    this.changed();
    return sent;
  }

  close() {
    this.closed = true;
    this.connection?.abort();
  }

  changed() {
    this.dispatchEvent(new Event("change"));
  }

  remember(entry) {
    this.commands = [...this.commands.slice(1 - REMEMBERED), entry];
    this.changed();
    return entry;
  }

  find(number) {
    return this.commands.find((each) => each.number === number);
  }

  // Events may come before the answer to the command that they are about.
  number(sent, number) {
    const told = this.find(number);
    if (told) this.commands = this.commands.filter((each) => each !== told);
    Object.assign(sent, { state: "received", ...told, number, own: true });
  }

  async run() {
    for (let wait = FIRST_WAIT; !this.closed && !this.over; wait = Math.min(2 * wait, LONGEST_WAIT)) {
      try {
        await this.listen(() => (wait = FIRST_WAIT));
      } catch {
        // the connection is lost; another follows
      }
      this.connected = false;
      if (this.closed || this.over) break;
      this.changed();
      await sleep(wait * (0.75 + Math.random() / 2)); // not all browsers at once
    }
  }

  async listen(onConnected) {
    this.connection = new AbortController();
    let timer;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.connection.abort(), SILENCE);
    };
    alive();
    try {
      const response = await this.fetch("events", { signal: this.connection.signal });
      if (REFUSED.has(response.status)) return this.end({ why: await sentenceOf(response) });
      this.trouble = response.ok ? null : await sentenceOf(response);
      if (this.trouble) return;
      for await (const [kind, data] of eventsOf(response.body, alive)) {
        if (!this.connected) onConnected();
        this.take(kind, data);
      }
    } finally {
      clearTimeout(timer);
    }
  }

  take(kind, data) {
    if (kind === "status") this.settle(data);
    else if (kind === "ended") return this.end(data);
    else if (kind === "received") {
      if (!this.find(data.number)) this.remember({ ...data, state: "received" });
    } else if (kind === "applied" || kind === "refused") {
      const entry = this.find(data.number) ?? this.remember({ command: {}, ...data });
      Object.assign(entry, data, { state: kind });
    }
    this.changed();
  }

  settle(status) {
    this.status = status;
    const waiting = new Map(status.waiting.map((each) => [each.number, each.command]));
    for (const [number, command] of waiting)
      if (!this.find(number)) this.remember({ number, command, state: "received" });
    if (!this.connected)
      for (const each of this.commands)
        if (each.state === "received" && !waiting.has(each.number)) each.state = "answered";
    this.connected = true;
    if (status.ended) this.end({ chunk: status.chunk, why: status.why });
  }

  end(over) {
    this.over = over;
    this.connected = false;
    this.changed();
  }
}
