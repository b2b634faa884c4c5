// The list of changes: a row for each, its verb and its controls.
import { $, all, choices, element, fromTemplate, whole, words } from "./page.js";
import { options } from "./server.js";

const LESION = () => options.lesions.map(({ name }) => [name]);
const STRUCTURE = () => options.structures.map((name) => [name]);
const number = (name, settings, value) => {
  const input = element("input", { type: "number", className: "amount", step: "any", value, ...settings });
  input.setAttribute("aria-label", name);
  return input;
};
const pick = (name, values, chosen) => {
  const select = element("select", { className: "name" });
  select.setAttribute("aria-label", name);
  const missing = chosen !== undefined && !values.some(([value]) => value === chosen);
  choices(select, missing ? [[chosen], ...values] : values, chosen); // a request may use another name for it
  return select;
};

// The first structure of a verb, and its number.
function first(asked = []) {
  if (typeof asked === "string" || Array.isArray(asked)) return [asked].flat().slice(0, 1).map(known);
  const [[name, amount]] = Object.entries(asked);
  return [known(name), [amount].flat()[0]];
}

// Each verb: its words, for which sources, its controls (filled from an edit), and the edit from them.
const VERBS = {
  insert: {
    words: "Put in a lesion",
    controls: (edit) => {
      const [name, mm] = first(edit?.insert);
      const lesion = pick("Lesion", LESION(), name);
      const hosts = element("span", { className: "note" });
      const say = () => {
        const found = options.lesions.find((one) => one.name === lesion.value)?.hosts ?? [];
        hosts.textContent = `grows in ${found.slice(0, 3).join(", ")}${found.length > 3 ? ` and ${found.length - 3} more` : ""}`;
      };
      lesion.addEventListener("change", say);
      say();
      return [lesion, number("Diameter in mm", { min: 1, max: 300 }, mm ?? 20), " mm ", hosts,
        element("label", {}, " seed ", number("Seed of this change", { min: 0, step: 1, className: "seed", placeholder: "next" }, edit?.seed ?? ""))];
    },
    edit: (row) => ({ insert: { [$(".name", row).value]: [$(".amount", row).valueAsNumber] }, seed: whole($(".seed", row).value) }),
  },
  resize: {
    words: "Change the size of",
    controls: (edit) => {
      const [name, factor] = first(edit?.resize);
      return [pick("Structure", STRUCTURE(), name ?? options.structures.find((one) => one === "left parotid gland")), " to ",
        number("Size in percent of now", { min: 10, max: 400 }, factor ? Number((100 * factor).toFixed(3)) : 130), " % of now"];
    },
    edit: (row) => ({ resize: { [$(".name", row).value]: $(".amount", row).valueAsNumber / 100 } }),
  },
  remove: {
    words: "Take out a lesion",
    controls: (edit) => [pick("Lesion", LESION(), first(edit?.remove)[0])],
    edit: (row) => ({ remove: $(".name", row).value }),
  },
  flip: {
    words: "Swap left and right",
    not: "ct",
    controls: () => [],
    edit: () => ({ flip: true }),
  },
  redraw: {
    words: "Draw anew",
    only: "ct",
    controls: (edit) => [pick("Structure", STRUCTURE(), first(edit?.redraw)[0])],
    edit: (row) => ({ redraw: $(".name", row).value }),
  },
};

const fits = (verb, source) => (VERBS[verb]?.only ?? source) === source && VERBS[verb]?.not !== source;

// The verbs that a source allows.
function offerVerbs(select, source, chosen) {
  const offered = Object.keys(VERBS).filter((name) => fits(name, source));
  if (all("option", select).map(({ value }) => value).join() === offered.join()) return; // an open list stays open
  choices(select, offered.map((name) => [name, VERBS[name].words]), chosen);
}

// Says to the form that a row came or went; what is typed into one bubbles up by itself.
const tellForm = () => $("#edit-list").dispatchEvent(new Event("change", { bubbles: true }));

// A row, of a request's edit where one is given: with its controls, or in words where they cannot say all of it.
export function addEdit(source, asked) {
  const row = fromTemplate("edit").firstElementChild;
  const verb = $(".verb", row);
  offerVerbs(verb, source, Object.keys(VERBS).find((name) => asked && name in asked) ?? "resize");
  const fill = (from) => $(".values", row).replaceChildren(...VERBS[verb.value].controls(from));
  verb.addEventListener("change", () => fill());
  $(".remove", row).addEventListener("click", () => {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    $("button", next ?? $("#edits")).focus();
    tellForm();
  });
  fill(asked);
  if (asked) {
    const shown = VERBS[verb.value].edit(row);
    if (plain(shown) !== plain(asked) || !all("input, select", row).every((input) => input.checkValidity())) {
      verb.parentElement.remove();
      $(".values", row).replaceChildren(`${inWords(asked)} (kept as it was asked for)`);
    }
    Object.assign(row, { asked, was: JSON.stringify(shown) });
  }
  $("#edit-list").append(row);
  tellForm();
  return row;
}

// Takes away the rows that a source does not allow.
export function fitEdits(source) {
  for (const row of all("#edit-list li")) {
    const verb = $(".verb", row);
    const verbs = verb ? [verb.value] : Object.keys(row.asked);
    if (!verbs.every((name) => fits(name, source))) row.remove();
    else if (verb) offerVerbs(verb, source, verb.value);
  }
}

// The name that a reader knows: a request may have a free id's own.
function known(name) {
  const id = /^placeholder (\d+)$/.exec(name)?.[1];
  return options.vocabulary.find((one) => String(one.id) === id)?.name ?? name;
}

// An edit as text that is the same for two that do the same.
const plain = (edit) => JSON.stringify(Object.entries(edit).filter(([, value]) => value !== undefined).sort().map(([key, value]) => {
  if (typeof value === "number" || typeof value === "boolean") return [key, value];
  if (typeof value === "string" || Array.isArray(value)) return [key, [value].flat().map(known)];
  return [key, Object.entries(value).map(([name, amounts]) => [known(name), [amounts].flat().map((one) => Number(one.toFixed(5)))])];
}));

const percent = (factor) => `${words(100 * factor, 3)} %`;
const mm = (several) => `${[several].flat().map((one) => words(one, 2)).join(" and ")} mm`;
const each = (asked, say) => Object.entries(asked ?? {}).map(([name, amount]) => say(known(name), amount));
const names = (asked = []) => [asked].flat().map(known);

// What an edit does, in the order in which the server does it (_edited in masks/edits.py).
function inWords(edit) {
  const done = [
    ...names(edit.remove).map((name) => `take out ${name}`),
    ...each(edit.resize, (name, factor) => `change the size of ${name} to ${percent(factor)} of now`),
    ...each(edit.insert, (name, diameters) => `put in ${name} of ${mm(diameters)}`),
    ...each(edit.augment, (name, factor) => `change the diameter of ${name} to ${percent(factor)} of now`),
    ...(edit.shift_mm ? [`move it by ${mm(edit.shift_mm)}`] : []),
    ...(edit.elastic_mm ? [`deform it by ${mm(edit.elastic_mm)}`] : []),
    ...(edit.flip ? ["swap left and right"] : []),
    ...names(edit.redraw).map((name) => `draw ${name} anew`),
  ].join(", then ") || "nothing";
  return `${done[0].toUpperCase()}${done.slice(1)}${edit.seed === undefined ? "" : `; seed ${edit.seed}`}`;
}

// As the request had them where a row was not touched since.
export const edits = () => all("#edit-list li").map((row) => {
  const verb = $(".verb", row);
  if (!verb) return row.asked;
  const edit = VERBS[verb.value].edit(row);
  return JSON.stringify(edit) === row.was ? row.asked : edit;
});
