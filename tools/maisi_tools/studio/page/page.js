// Small tools of the page. Names that come from files are set as text, never as markup.

export const $ = (selector, root = document) => root.querySelector(selector);
export const all = (selector, root = document) => [...root.querySelectorAll(selector)];
export const fromTemplate = (id) => $(`#${id}`).content.cloneNode(true);
export const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
export const words = (number, digits = 0) => Number(number).toLocaleString("en", { maximumFractionDigits: digits });
export const whole = (text) => (text === "" ? undefined : Number(text));

export function element(tag, settings = {}, ...children) {
  const made = Object.assign(document.createElement(tag), settings);
  made.append(...children);
  return made;
}

export function choices(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => element("option", { value, textContent: text ?? value })));
  if (chosen !== undefined && values.some(([value]) => value === chosen)) select.value = chosen;
}

export function size(bytes) {
  const [unit, name] = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "bytes"]].find(([unit]) => bytes >= unit) ?? [1, "bytes"];
  return `${words(bytes / unit, unit > 1 ? 1 : 0)} ${name}`;
}

// Screen readers hear what changed, not each step.
export function announce(text) {
  const said = $("#said");
  if (said.textContent !== text) said.textContent = text;
}
