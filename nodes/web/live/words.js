// What is said about commands, chunks and times.

import { t } from "./language.js";

export const seconds = (value) => {
  const [minutes, rest] = [Math.floor(value / 60), value % 60];
  return minutes ? `${minutes}:${rest.toFixed(1).padStart(4, "0")}` : `${rest.toFixed(1)} s`;
};

// A chunk that begins a video, or follows a cut, has fewer images: exact where the stream stands, and
// near enough elsewhere.
export const place = (chunk, { chunk: now, seconds: passed, chunk_seconds }) =>
  `${t("chunk {chunk}", { chunk })} · ${seconds(Math.max(0, passed + (chunk - now) * chunk_seconds))}`;

export const bytes = (value) => {
  const megabytes = value / 2 ** 20;
  return megabytes < 1000 ? `${Math.round(megabytes)} MB` : `${(megabytes / 1024).toFixed(1)} GB`;
};

const quoted = (text = "") => `“${text}”`;

const SAID = {
  prompt: ({ text, mode }) => `${quoted(text)} · ${mode}`,
  lora: ({ name, strength }) => `${name} ${strength.toFixed(2)}`,
  strength: ({ strength }) => t("source strength {strength}", { strength: strength.toFixed(2) }),
  decay: ({ decay }) => t("sink decay {decay}", { decay }),
  cut: ({ text }) => (text ? t("cut to {text}", { text: quoted(text) }) : t("cut")),
  rewind: (command) =>
    command.branch
      ? t("rewind to chunk {chunk} as {branch}", command)
      : t("rewind to chunk {chunk}", command),
  schedule: ({ chunk, text, mode }) =>
    t("{change} at chunk {chunk}", { change: `${quoted(text)} · ${mode}`, chunk }),
  move: (command) => t("move #{change} to chunk {chunk}", command),
  pause: () => t("pause"),
  resume: () => t("resume"),
  stop: () => t("stop"),
  drop: (command) => t("drop #{change}", command),
};

export const said = (command) => SAID[command.do]?.(command) ?? command.do ?? t("a command");

export const answered = ({ state, chunk, why, command }) => {
  if (state === "applied") return command.do === "stop" ? t("stopped") : t("from chunk {chunk}", { chunk });
  if (state === "refused") return t("refused: {why}", { why });
  if (state === "answered") return t("answered while offline");
  return state === "sent" ? t("sent") : t("waits");
};
