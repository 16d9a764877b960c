// What a node tells at its end stays on it: as text, or as rows in columns. Text that comes as progress
// goes with the run in newer frontends.

import { app } from "../../scripts/app.js";
import { after } from "./after.js";

const LEAST = 58; // pixels
const MOST = 200; // then it scrolls
const PADDING = 4;
const MARGIN = 8; // around it, which the classic renderer takes off its height

const STYLE = `
  overflow: auto; width: 100%; height: 100%; max-height: ${MOST}px; box-sizing: border-box;
  padding: ${PADDING}px 10px; font-size: 12px; color: var(--input-text); user-select: text;
  white-space: pre-wrap; overflow-wrap: anywhere; font-variant-numeric: tabular-nums;
`;

function tableOf(rows) {
  const table = document.createElement("table");
  for (const texts of rows) {
    const row = table.insertRow();
    for (const text of texts) {
      const cell = row.insertCell();
      cell.textContent = text;
      cell.style.cssText = "padding: 0 12px 2px 0; vertical-align: top; overflow-wrap: normal;";
    }
    for (const cell of [...row.cells].slice(0, -1)) cell.style.whiteSpace = "nowrap";
  }
  return table;
}

function textOf(lines) {
  const text = document.createElement("div");
  text.textContent = lines.join("\n");
  return text;
}

function widgetOf(node) {
  const content = document.createElement("div");
  const element = document.createElement("div");
  element.style.cssText = STYLE;
  element.append(content);
  const height = () => Math.max(LEAST, Math.min(MOST, content.offsetHeight + 2 * PADDING));
  const getMinHeight = () => height() + 2 * MARGIN;
  const options = { serialize: false, margin: MARGIN, getMinHeight };
  const widget = node.addDOMWidget("told", "told", element, options);
  widget.serialize = false;
  new ResizeObserver(() => node.setDirtyCanvas(true, true)).observe(content); // it has a width later
  return widget;
}

function tell(node, output) {
  const { text, rows } = output ?? {}; // null of a node that was not run again
  if (!text) return;
  const widget = node.widgets?.find((each) => each.name === "told") ?? widgetOf(node);
  widget.element.firstChild.replaceChildren(rows ? tableOf(rows) : textOf(text));
}

app.registerExtension({
  name: "RewardForcing.Told",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("RF")) return;
    after(node, "onExecuted", (output) => tell(node, output));
  },
});
