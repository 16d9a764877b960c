// A small form over the picture: what a click on the strip of time asks before it does anything.

import { button, element } from "./element.js";
import { t } from "./language.js";

let count = 0;

export class Popover {
  element = element("form", { className: "rf-popover", hidden: true });

  constructor() {
    this.element.addEventListener("submit", (event) => {
      event.preventDefault();
      this.onSubmit(Object.fromEntries(new FormData(this.element)));
      this.hide();
    });
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.hide();
      if (event.key === "Enter" && event.ctrlKey) this.element.requestSubmit();
    });
  }

  // fields: {name: [label, element]}
  show(title, fields, action, onSubmit) {
    this.before ??= document.activeElement;
    this.onSubmit = onSubmit;
    const rows = Object.entries(fields).map(([name, [label, field]]) => {
      Object.assign(field, { name, id: `rf-field-${++count}` });
      const words = element("label", { htmlFor: field.id, textContent: label });
      return element("div", { className: "rf-row" }, words, field);
    });
    const submit = element("button", { type: "submit", className: "rf-main", textContent: action });
    const cancel = button(t("Cancel"), () => this.hide());
    const row = element("div", { className: "rf-row rf-end" }, cancel, submit);
    this.element.setAttribute("aria-label", title);
    this.element.replaceChildren(element("strong", { textContent: title }), ...rows, row);
    this.element.hidden = false;
    this.element.querySelector("input, textarea, .rf-main").focus({ preventScroll: true });
  }

  hide() {
    this.element.hidden = true;
    this.element.replaceChildren();
    this.before?.focus?.({ preventScroll: true });
    this.before = null;
  }
}
