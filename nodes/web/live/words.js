// What is said about commands, chunks and times.

export const seconds = (value) => {
  const [minutes, rest] = [Math.floor(value / 60), value % 60];
  return minutes ? `${minutes}:${rest.toFixed(1).padStart(4, "0")}` : `${rest.toFixed(1)} s`;
};

// A chunk that begins a video, or follows a cut, has fewer images: exact where the stream stands, and
// near enough elsewhere.
export const place = (chunk, { chunk: now, seconds: passed, chunk_seconds }) =>
  `chunk ${chunk} · ${seconds(Math.max(0, passed + (chunk - now) * chunk_seconds))}`;

export const bytes = (value) => {
  const megabytes = value / 2 ** 20;
  return megabytes < 1000 ? `${Math.round(megabytes)} MB` : `${(megabytes / 1024).toFixed(1)} GB`;
};

const quoted = (text = "") => `“${text}”`;

const SAID = {
  prompt: ({ text, mode }) => `${quoted(text)} · ${mode}`,
  lora: ({ name, strength }) => `${name} ${strength.toFixed(2)}`,
  decay: ({ decay }) => `sink decay ${decay}`,
  cut: ({ text }) => (text ? `cut to ${quoted(text)}` : "cut"),
  rewind: ({ chunk, branch }) => `rewind to chunk ${chunk}${branch ? ` as ${branch}` : ""}`,
  schedule: ({ chunk, text, mode }) => `${quoted(text)} · ${mode} at chunk ${chunk}`,
  move: ({ change, chunk }) => `move #${change} to chunk ${chunk}`,
  drop: ({ change }) => `drop #${change}`,
};

export const said = (command) => SAID[command.do]?.(command) ?? command.do ?? "a command";

export const answered = ({ state, chunk, why, command }) => {
  if (state === "applied") return command.do === "stop" ? "stopped" : `from chunk ${chunk}`;
  return { refused: `refused: ${why}`, answered: "answered while offline", sent: "sent" }[state] ?? "waits";
};
