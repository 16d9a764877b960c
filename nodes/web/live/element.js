// Elements in one line each. Text goes in as text: nothing here reads markup.

export function element(tag, about = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...inside);
  return made;
}

export function button(label, onclick, about = {}) {
  return element("button", { type: "button", textContent: label, onclick, ...about });
}

// What is not new is not written: nothing is laid out again, and a screen reader stays quiet.
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
